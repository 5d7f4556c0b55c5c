"""The gradient norm of every part of the model (model.parts), over all ranks, before clipping.

The distributed optimizer leaves each rank a shard of the reduced gradients. megatron-core's rule says which shards
count, so that a parameter counts once however many ranks hold it: the sum of the squares over the parts is the square
of `grad_norm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from model.parts import part_of

PARTS = ("vision", "adapter", "decoder", "router")


class PartNorms:
    """Computes the norms from this rank's shards.

    Args:
        model: the model's chunks.
        optimizer: their distributed optimizer.
    """

    def __init__(self, model: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
        names = {parameter: name for chunk in model for name, parameter in chunk.named_parameters()}
        self._shards: list[tuple[Any, int, int]] = []  # parameter, begin and end of its shard
        parts: list[int] = []
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            if getattr(part, "is_stub_optimizer", False):
                continue
            groups = [*part.model_float16_groups, *part.model_fp32_groups]
            for parameter in (parameter for group in groups for parameter in group):
                if not _counts(parameter, part):
                    continue
                shard = part._get_model_param_range_map(parameter)["param"]
                self._shards.append((parameter, shard.start, shard.end))
                parts.append(PARTS.index(part_of(names[parameter])))
        device = torch.cuda.current_device()
        self._parts = torch.tensor(parts, dtype=torch.int64, device=device)
        found = self._parts.bincount(minlength=len(PARTS))
        dist.all_reduce(found)
        self._trained = [part for part, count in zip(PARTS, found.tolist(), strict=True) if count]  # on any rank

    def shards(self) -> list[tuple[Any, Tensor]]:
        """Return the parameters that count on this rank, each with its shard of the reduced gradient."""
        return [(parameter, parameter.main_grad.view(-1)[begin:end]) for parameter, begin, end in self._shards]

    @torch.no_grad()
    def compute(self) -> dict[str, float]:
        """Return the norm of each part that is trained. Collective. Call it between backward pass and update."""
        squares = torch.zeros(len(PARTS), dtype=torch.float64, device=self._parts.device)
        if self._shards:
            gradients = [shard for _, shard in self.shards()]
            norms = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).double()
            squares.index_add_(0, self._parts, norms.square())
        dist.all_reduce(squares)
        return {part: norm for part, norm in zip(PARTS, squares.sqrt().tolist(), strict=True) if part in self._trained}


def _counts(parameter: Any, optimizer: Any) -> bool:
    """Whether megatron-core counts this rank's shard of a parameter in the gradient norm."""
    group = getattr(optimizer, "tp_group", None)
    return param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter, group)
