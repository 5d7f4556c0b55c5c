"""What a process of tests/new with Transformer Engine runs: load a checkpoint into its modules and save it again."""

from __future__ import annotations

import tests.te.stand_in  # isort: skip  (before megatron-core, which looks for Transformer Engine only once)

from pathlib import Path

import megatron.core
import transformer_engine

from model.checkpoint import load_checkpoint, save_checkpoint
from model.config import GlmvConfig
from model.glmv import GlmvModel
from model.parallel import ParallelConfig, initialize_model_parallel
from model.transformer_engine import TransformerEngineSpecProvider
from tests.te.fake_ranks import pretended_gpu

__all__ = ["load_and_save_weights", "tests", "versions"]


def versions() -> tuple[str, str]:
    return str(megatron.core.__version__), str(transformer_engine.__version__)


def load_and_save_weights(folder: str, source: str, target: str) -> None:
    initialize_model_parallel(ParallelConfig(), seed=1)
    with pretended_gpu():
        model = GlmvModel(GlmvConfig.from_hf(Path(folder)), ParallelConfig(), backend=TransformerEngineSpecProvider())
    load_checkpoint(Path(source), [model])
    save_checkpoint(Path(target), [model], hf_files=lambda _: None)
