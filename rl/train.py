"""Reinforcement learning with curriculum sampling (RLCS), from a fine-tuned model.

torchrun --nproc_per_node N -m rl.train --config configs/tiny/rl.yaml [dotted.key=value ...]
"""

from rl.config import RlConfig
from training.launch import main

if __name__ == "__main__":
    main(RlConfig, __doc__, package="rl")
