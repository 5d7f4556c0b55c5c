"""The whole model in one process, for conversion, evaluation and tests."""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state

from model.config import GlmvConfig
from model.glmv import GlmvModel
from model.parallel import ParallelConfig
from model.process_groups import initialize_model_parallel
from model.weights.load import WeightSource, load_weights


def build_whole_model(config: GlmvConfig, weights: WeightSource | None = None, **options: Any) -> GlmvModel:
    """Build the whole model in this process.

    torch.distributed must be initialised with one process. megatron-core's groups are created unless they exist.

    Args:
        config: The model.
        weights: Where its weights come from. None leaves them uninitialised, for `model.checkpoint.load_checkpoint`.
        options: Keyword arguments of `GlmvModel`.

    Raises:
        WeightsError: The weights do not fit the model.
    """
    if not parallel_state.model_parallel_is_initialized():
        initialize_model_parallel(ParallelConfig(), seed=0)
    model = GlmvModel(config, ParallelConfig(), **options)
    if weights is not None:
        load_weights([model], weights)
    return model
