"""What differs between the versions of megatron-core that the model runs with: 0.16.1 to 0.19.2.

Every difference that the code must know is here, with the version that it serves. `model.installed` has the range.

| since | what megatron-core changed | what serves it |
|---|---|---|
| 0.17 | a backend gives experts as one builder instead of a class and its submodules | `experts_of` |
| 0.17 | routers are built with `is_mtp_layer` | `SegmentRouter.__init__` ignores it: there is no such layer |
| 0.17 | modules in a spec are called, with `name`, instead of given to `build_module` | `ModuleSpec` can be called |
| 0.17 | the sorting of tokens returns padding too | `PERMUTE_RESULTS` |
| 0.17 | tokens are sorted into a known number of rows | `SORTS_ANY_NUMBER`: padding is dispatched too |
| 0.18 | balance losses are recorded by an object | `record_loss`, `recorded_losses`, `clear_recorded_losses` |
| 0.18 | `cuda_graph_scope` is `cuda_graph_modules` | `NO_CUDA_GRAPHS` |
| 0.18 | an optimizer is told itself not to gather the weights after its update | `gather_after_update` |
| 0.18 | Triton is imported everywhere, and is no dependency | setup.py |
| 0.19 | Adam is built with `capturable` | `GroupStepAdamW.__init__` ignores it: it is for CUDA graphs |
| 0.19 | groups of the optimizer are found by their learning rates too | `with_groups_of` |
| 0.19 | what is no tensor is pickled among the tensors, not in common.pt | `model.checkpoint_writer` writes common.pt |
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import megatron.core
from megatron.core.transformer.moe import moe_utils
from torch import Tensor

MEGATRON_CORE: str = megatron.core.__version__
VERSION = tuple(int(number) for number in MEGATRON_CORE.split(".")[:2])

# TransformerConfig's field for the parts of a layer that CUDA graphs replay.
_CUDA_GRAPHS = "cuda_graph_modules" if VERSION >= (0, 18) else "cuda_graph_scope"
NO_CUDA_GRAPHS: dict[str, Any] = {_CUDA_GRAPHS: []}

# Whether the sorting of tokens by expert, where it is not fused, takes the number of rows from the routing map.
SORTS_ANY_NUMBER = VERSION < (0, 17)
PERMUTE_RESULTS = 3 if VERSION < (0, 17) else 5  # that `permute` returns: tokens, probabilities, places, padding


def experts_of(grouped_mlp_modules: Callable[..., Any], grouped: bool) -> tuple[type, Any]:
    """Return the class and the submodules of the experts that one of megatron-core's backends gives.

    Args:
        grouped_mlp_modules: The method of the backend.
        grouped: Whether one product multiplies all experts of a rank.
    """
    if VERSION < (0, 17):
        experts, submodules = grouped_mlp_modules(grouped, False)
        return experts, submodules
    builder = grouped_mlp_modules(grouped)
    assert isinstance(builder, partial)
    return builder.func, builder.keywords["submodules"]  # type: ignore[return-value]


def gather_after_update(optimizer: Any, gathers: bool) -> None:
    """Let one of chained distributed optimizers gather all weights after its update, or not."""
    if VERSION < (0, 18):
        for ddp in optimizer.model_chunks:
            ddp.overlap_param_gather_with_optimizer_step = not gathers
    else:
        optimizer._defer_param_sync = not gathers


def record_loss(name: str, loss: Tensor, layer_number: int, layers: int) -> None:
    """Add a layer's loss, numbered from 1, to what is recorded under `name`."""
    if VERSION < (0, 18):
        moe_utils.save_to_aux_losses_tracker(name, loss, layer_number, layers)
    else:
        _metrics_tracker().record(name, loss, layer_number, layers)


def recorded_losses() -> dict[str, Any]:
    """Return what megatron-core records from step to step, by name."""
    return moe_utils.get_moe_layer_wise_logging_tracker() if VERSION < (0, 18) else _metrics_tracker().metrics


def recorded_loss(name: str) -> Tensor | None:
    """Return what is recorded under `name`, by layer; None if nothing is."""
    recorded = recorded_losses().get(name)
    if recorded is None:
        return None
    return recorded["values"] if VERSION < (0, 18) else recorded.values


def clear_recorded_losses() -> None:
    """Set what is recorded to zero."""
    if VERSION < (0, 18):
        moe_utils.clear_aux_losses_tracker()
    else:
        _metrics_tracker().clear()


def _metrics_tracker() -> Any:
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    return get_moe_metrics_tracker()


def with_groups_of(optimizer: Any, state: Any) -> Any:
    """Return a loaded state of an optimizer with the parameter groups that the optimizer itself has.

    megatron-core looks up the group that was saved for each present one: up to 0.18 by its factor of the weight decay,
    and since 0.19 by its learning rates and weight decays too, which may change when a run resumes. The groups say
    nothing else that is needed, because `model.checkpoint` restores their hyperparameters and step.

    Args:
        optimizer: The optimizer that loads the state, or a chain of them.
        state: Of one optimizer, or of each of the chain.
    """
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    if len(chained) > 1:
        return {key: with_groups_of(part, state[key]) for part, key in zip(chained, sorted(state), strict=True)}
    own = chained[0].optimizer
    groups = [] if own is None else own.state_dict()["param_groups"]
    return {**state, "optimizer": {**state["optimizer"], "param_groups": groups}}
