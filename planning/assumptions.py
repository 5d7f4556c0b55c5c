"""Settings of a run that its plan does not follow."""

from __future__ import annotations

from collections.abc import Iterator

from training.config import RunConfig


def not_planned(config: RunConfig) -> Iterator[str]:
    """Yield each setting with what is planned in its place."""
    fp8, optimizer, moe = config.fp8, config.optimizer, config.moe
    if fp8.enabled:
        yield (
            f"fp8.recipe={fp8.recipe}: planned in bf16; with it about 2 bytes more per weight multiplied in FP8 are "
            "kept, and fewer activations"
        )
    if optimizer.offload_fraction:
        yield (
            f"optimizer.offload_fraction={optimizer.offload_fraction:g}: its share of the state is not counted; the "
            "buffers of its transfers are not, either"
        )
    if moe.dispatcher == "flex":
        yield "moe.dispatcher=flex: planned with alltoall; DeepEP's buffers are not counted"
    if moe.shared_expert_overlap:
        yield "moe.shared_expert_overlap=true: planned without"
