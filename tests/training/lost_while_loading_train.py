"""`pretrain.train` whose second process is killed when it would load a checkpoint."""

from __future__ import annotations

import os
import signal
from typing import Any

from megatron.core import dist_checkpointing

from training.config import RunConfig
from training.launch import main
from training.ranks import rank


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    if rank() == 1:
        dist_checkpointing.load = die
    main(RunConfig, __doc__)
