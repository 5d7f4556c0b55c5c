"""Collect what a checkpoint holds: weights and the optimizer's state, as they are or as a copy of this moment.

The copy is what an asynchronous save writes while training changes the weights. It is made of this process's own
tensors, without communication (except for weights that are kept in FP8, see model.fp8_weights): assembling the
optimizer's state, which takes longer, is left to the one who writes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, is_main_replica
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import Tensor, nn

from model.fp8_weights import with_exact_weights
from model.lora_layers import sharded_adapters

# The optimizer's state on disk: tensors of the parameters' own shapes, with the same keys at every layout. They are
# assembled in main memory, on one data-parallel rank: on every rank's device they would take the state's size again.
OPTIMIZER_FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
}
ADAM_STATE = ("param", "exp_avg", "exp_avg_sq")  # of a parameter, in float32


def sharded_state(
    model_chunks: Sequence[nn.Module], optimizer: MegatronOptimizer | None, *, is_loading: bool = False
) -> dict[str, Any]:
    """Return the state of a model and its optimizer, with a description of how it is sharded. Collective.

    Args:
        model_chunks: What this rank holds of the model, one chunk per virtual pipeline stage.
        optimizer: Its state is included, unless None.
        is_loading: Whether the tensors are to be filled, instead of written.
    """
    state = _model_state(model_chunks)
    if optimizer is not None:
        if not is_loading:
            _begin_state(optimizer)
        state["optimizer"] = _optimizer_state(optimizer, state, is_loading)
    return with_exact_weights(state, optimizer, is_loading=is_loading)


def _model_state(model_chunks: Sequence[nn.Module]) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for number, chunk in enumerate(model_chunks):
        sharded: Any = chunk
        held = sharded.sharded_state_dict() if sharded.lora is None else sharded_adapters(sharded)
        # Objects (megatron-core's `_extra_state`, empty in this model) would be written, and read back, with pickle.
        state[f"model{number}"] = {key: value for key, value in held.items() if not isinstance(value, ShardedObject)}
    return state


def _begin_state(optimizer: Any) -> None:
    """Give an optimizer that has not updated anything yet the state that it has then, which it makes when it does."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.optimizer is not None and not part.optimizer.state and part.init_state_fn:
            part.init_state_fn(part.optimizer, part.config)


def _optimizer_state(optimizer: Any, model_state: dict[str, Any], is_loading: bool) -> Any:
    return optimizer.sharded_state_dict(dict(model_state), is_loading=is_loading, metadata=OPTIMIZER_FORMAT)


class StateCopy:
    """A copy of this process's state in main memory, pinned where the state is on a GPU.

    The memory is kept and used again by the next copy.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._used = 0

    def take(self, model_chunks: Sequence[nn.Module], optimizer: MegatronOptimizer) -> Callable[[], dict[str, Any]]:
        """Copy the state as it is now.

        Returns:
            A function that gives what `sharded_state` would have given now. It is collective, over the gloo groups of
            the data-parallel ranks, and can run in another thread. It is valid until the next copy.
        """
        self._used = 0
        _begin_state(optimizer)
        live = _model_state(model_chunks)
        exact = with_exact_weights(live, optimizer, is_loading=False)
        copied = {chunk: {key: self._copy_shard(value) for key, value in part.items()} for chunk, part in exact.items()}
        frozen = self._freeze(optimizer)
        torch.cuda.synchronize()

        def state() -> dict[str, Any]:
            with torch.no_grad():
                # The optimizer looks up its parameters in the live state, for their names and shapes.
                return {**copied, "optimizer": _optimizer_state(frozen, live, is_loading=False)}

        return state

    def _copy_shard(self, shard: Any) -> Any:
        """Copy the data of a shard that this process writes; others write the replicas."""
        return replace(shard, data=self._copy(shard.data)) if is_main_replica(shard.replica_id) else shard

    def _freeze(self, optimizer: Any) -> Any:
        """Return an optimizer that saves the present state of `optimizer`, whatever that does later."""
        if isinstance(optimizer, ChainedOptimizer):
            chain: Any = optimizer
            if len(chain.chained_optimizers) > 1:
                chain._synchronize_steps()
            frozen: Any = copy.copy(chain)
            frozen.chained_optimizers = [self._freeze(part) for part in chain.chained_optimizers]
            frozen._synchronize_steps = lambda: None
            return frozen
        frozen = copy.copy(optimizer)
        groups = copy.deepcopy(optimizer.state_dict())
        states = {
            parameter: self._copy_adam_state(optimizer._get_main_param_and_optimizer_states(parameter))
            for parameter in optimizer.model_param_group_index_map
        }
        frozen.state_dict = lambda: copy.deepcopy(groups)
        frozen._get_main_param_and_optimizer_states = states.__getitem__
        return frozen

    def _copy_adam_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: self._copy(state[key]) for key in ADAM_STATE}

    def _copy(self, tensor: Tensor) -> Tensor:
        number, self._used = self._used, self._used + 1
        if number == len(self._buffers):
            self._buffers.append(torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda))
        with torch.no_grad():
            return self._buffers[number].copy_(tensor, non_blocking=True)
