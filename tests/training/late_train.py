"""`pretrain.train` whose main process starts later than the others, as on a busy machine."""

from __future__ import annotations

import time

from training.config import RunConfig
from training.launch import main
from training.ranks import rank

if __name__ == "__main__":
    if rank() == 0:
        time.sleep(3)
    main(RunConfig, __doc__)
