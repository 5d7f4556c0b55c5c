"""`pretrain.train` on storage that takes long to write the tensors of a checkpoint."""

from __future__ import annotations

import os
import time
from typing import Any

from training.config import RunConfig
from training.launch import main

SECONDS = 15
flush = os.fsync


def flush_slowly(descriptor: Any) -> None:
    if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".distcp"):
        time.sleep(SECONDS)
    flush(descriptor)


if __name__ == "__main__":
    system: Any = os
    system.fsync = flush_slowly
    main(RunConfig, __doc__)
