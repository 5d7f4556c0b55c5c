"""What a process of tests/new with Transformer Engine runs: load a checkpoint into its modules and save it again.

Imports are in the functions: megatron-core looks for Transformer Engine once, so the stand-in for its compiled part is
first. The process of the test itself has neither.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path


def versions() -> tuple[str, str]:
    import_module("tests.te.stand_in")
    import megatron.core
    import transformer_engine

    return str(megatron.core.__version__).split("+")[0], str(transformer_engine.__version__)


def load_and_save_weights(folder: str, source: str, target: str) -> None:
    import_module("tests.te.stand_in")
    from model.checkpoint import load_checkpoint, save_checkpoint
    from model.config import GlmvConfig
    from model.glmv import GlmvModel
    from model.parallel import ParallelConfig
    from model.process_groups import initialize_model_parallel
    from model.transformer_engine import TransformerEngineSpecProvider
    from tests.te.fake_ranks import pretended_gpu

    initialize_model_parallel(ParallelConfig(), seed=1)
    with pretended_gpu():
        model = GlmvModel(GlmvConfig.from_hf(Path(folder)), ParallelConfig(), backend=TransformerEngineSpecProvider())
    load_checkpoint(Path(source), [model])
    save_checkpoint(Path(target), [model], hf_files=lambda _: None)
