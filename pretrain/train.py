"""Pretrain, or continue at a longer context (the same code with another YAML).

torchrun --nproc_per_node N -m pretrain.train --config configs/tiny/pretrain.yaml [dotted.key=value ...]
"""

from training.config import RunConfig
from training.launch import main

if __name__ == "__main__":
    main(RunConfig, __doc__)
