"""Write a checkpoint with the torch backend, in a process without Transformer Engine.

python -m tests.te.torch_checkpoint HF_FOLDER STEP_FOLDER
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch.distributed as dist

from model.checkpoint import save_checkpoint
from model.config import GlmvConfig
from model.glmv import GlmvModel
from model.parallel import ParallelConfig
from model.process_groups import initialize_model_parallel
from model.weights.load import SafetensorsFolder, load_weights


def main(hf_folder: Path, step_folder: Path) -> None:
    assert find_spec("transformer_engine") is None
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    initialize_model_parallel(ParallelConfig(), seed=1)
    model = GlmvModel(GlmvConfig.from_hf(hf_folder), ParallelConfig())
    load_weights([model], SafetensorsFolder(hf_folder))
    save_checkpoint(step_folder, [model], hf_files=lambda folder: None)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
