"""Filters for warnings and log lines of megatron-core and torch that this project cannot act on.

Each filter says why the message is of no use here. `model/__init__.py` sets them before megatron-core is imported.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable

# Arguments of warnings.filterwarnings.
WARNINGS: list[dict[str, object]] = [
    # megatron-core uses names that torch 2.13 deprecates.
    {"category": FutureWarning, "module": "(torch.distributed|megatron.core.dist_checkpointing)"},
    # megatron-core reads `.grad` of sharded parameters, which are not leaves.
    {"message": "The .grad attribute of a Tensor that is not a leaf"},
    # Whole experts on each tensor-parallel rank (expert_tensor_parallel_size=1) are intended.
    {"message": "`sequence_parallel` is set to `True`, but tensor model parallel size"},
    # Logged at every start with `core_attn` recompute: kernels that never keep the scores gain little from it.
    {"message": "If you are using transformer_engine as the transformer implementation"},
]

WARNINGS_WITHOUT_CUDA: list[dict[str, object]] = [
    # The fused kernels that are missing on a CPU have fallbacks in torch.
    {"message": ".*Apex (is|are) not installed.*"},
    # A variable of the CUDA driver.
    {"message": ".*CUDA_DEVICE_MAX_CONNECTIONS"},
]

# Logger and text of the messages that it does not log.
LOG_MESSAGES: list[tuple[str, str]] = [
    # megatron-core knows its own MoELayer by class; model.moe.SegmentMoELayer is another class with the same arguments.
    ("megatron.core.transformer.transformer_layer", "Unknown MLP type"),
    # Since 0.17, once per layer: it asks for another way to write a spec, which 0.16 does not know.
    ("megatron.core.transformer.transformer_layer", "Rewrapping ModuleSpec"),
    # Since 0.19: docs/model.md says what a move to its successor would take.
    ("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
    # Since 0.17: common.pt, which all versions read, holds no code; what replaces it is read without that check.
    ("megatron.core.dist_checkpointing.strategies.common", "load_common is deprecated"),
    # One data-parallel rank alone writes the optimizer's state; the others report at every save that they have none.
    ("megatron.core.dist_checkpointing.validation", "common state dict differs"),
    # The errors that it logs are also raised.
    ("megatron.core.dist_checkpointing.strategies.filesystem_async", "encountered an error"),
]

LOG_MESSAGES_WITHOUT_CUDA: list[tuple[str, str]] = [
    # The CPU's generator also stands in for the device's (model.cpu), so its state changes while that one is in use.
    ("megatron.core.tensor_parallel.random", "CPU RNG state changed"),
]


def quiet_megatron() -> None:
    """Set the filters that hold on every machine."""
    _ignore(WARNINGS, LOG_MESSAGES)


def quiet_megatron_without_cuda() -> None:
    """Set the filters for a machine without CUDA."""
    _ignore(WARNINGS_WITHOUT_CUDA, LOG_MESSAGES_WITHOUT_CUDA)


def _ignore(filters: list[dict[str, object]], messages: list[tuple[str, str]]) -> None:
    for arguments in filters:
        warnings.filterwarnings("ignore", **arguments)  # type: ignore[arg-type]
    for logger, text in messages:
        logging.getLogger(logger).addFilter(_without(text))


def _without(text: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: text not in record.getMessage()
