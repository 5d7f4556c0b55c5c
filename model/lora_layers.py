"""The modules of LoRA: low-rank adapters beside frozen linear layers, exact in every layout.

An adapter of rank r holds A [r, in] and B [out, r], and its linear layer returns

    W x  +  alpha / r * B (A x)

where `lora.dropout` drops values of the x before A (`model.lora_dropout`). How A and B are split over tensor ranks:

    the layer splits     A                      B                     between A and B
    its rows             whole on every rank    rows, as the layer    z = A x is gathered (sequence parallel) or copied
    its columns          columns, as the layer  whole on every rank   z is summed over ranks, and scattered again
    nothing, experts     whole                  whole                 nothing

Under sequence parallelism, a factor that is whole on every rank sees only its rank's tokens. megatron-core sums its
gradient over tensor ranks, because it is marked `sequence_parallel`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from model.canonical_names import canonical_name
from model.lora_config import LoraConfig
from model.lora_dropout import AdapterDropout, DropoutMask, dropped_linear
from model.lora_targets import Site

ADAPTERS = "lora"  # name of the module in a linear layer that holds its adapters


class Adapter(nn.Module):
    """One adapter, or a tensor rank's part of it.

    Args:
        site: The adapted matrix.
        config: Rank and scale.
        weight: This rank's part of the layer's matrix, which tells dtype, device and what is split.
        group: Tensor ranks that share the layer.
        sequence_parallel: Whether the layer gathers, or scatters, the sequence.
        dropout: The dropout of the model's adapters.
    """

    def __init__(
        self,
        site: Site,
        config: LoraConfig,
        weight: Tensor,
        group: Any,
        sequence_parallel: bool,
        dropout: AdapterDropout,
    ) -> None:
        super().__init__()
        self.site, self.scale, self.group, self.dropout = site, config.scale, group, dropout
        self.sequence_parallel = sequence_parallel
        self.splits_columns = weight.size(1) != site.width
        row_ranks = sum(site.layer_rows) // weight.size(0)
        self.splits_rows = row_ranks > 1
        self.factors = ["a", *(f"b{block}" for block in range(len(site.rows)))]
        shapes = [(config.rank, weight.size(1)), *((rows // row_ranks, config.rank) for rows in site.rows)]
        for name, shape in zip(self.factors, shapes, strict=True):
            factor: Any = nn.Parameter(torch.zeros(shape, dtype=weight.dtype, device=weight.device))
            factor.tensor_model_parallel = self.split_dim(name) is not None
            factor.sequence_parallel = sequence_parallel and not factor.tensor_model_parallel
            self.register_parameter(name, factor)

    def split_dim(self, factor: str) -> int | None:
        """Return the dimension of `a` or a block of B that is split over tensor ranks."""
        if factor == "a":
            return 1 if self.splits_columns else None
        return 0 if self.splits_rows else None

    @property
    def blocks(self) -> list[Tensor]:
        """The blocks of B."""
        return [getattr(self, name) for name in self.factors[1:]]

    def forward(self, x: Tensor) -> Tensor:
        """Map the layer's input [tokens, ..., in] to what is added to this matrix's output."""
        z = self._exchange(dropped_linear(x, self.get_parameter("a"), self._mask())) * self.scale
        outputs = [F.linear(z, block) for block in self.blocks]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def _mask(self) -> DropoutMask | None:
        """Return the mask of this rank's part of the input: some channels of all rows, or all channels of some rows."""
        rank, ranks, width = self.group.rank(), self.group.size(), self.site.width
        if self.splits_columns:
            own = width // ranks
            return self.dropout.mask(self.site.module, range(rank * own, (rank + 1) * own))
        part, parts = (rank, ranks) if self.sequence_parallel else (0, 1)
        return self.dropout.mask(self.site.module, range(width), part, parts)

    def _exchange(self, z: Tensor) -> Tensor:
        if self.splits_rows:
            if self.sequence_parallel:
                return gather_from_sequence_parallel_region(z, group=self.group)
            return copy_to_tensor_model_parallel_region(z, group=self.group)
        if self.splits_columns:
            if self.sequence_parallel:
                return reduce_scatter_to_sequence_parallel_region(z, group=self.group)
            return reduce_from_tensor_model_parallel_region(z, group=self.group)
        return z


class LinearAdapters(nn.ModuleDict):
    """The adapters of one linear layer, by the last words of their matrices' names.

    Args:
        adapters: Adapters of some of the layer's matrices.
        weight: This rank's part of the layer's matrix.
    """

    def __init__(self, adapters: Sequence[Adapter], weight: Tensor) -> None:
        super().__init__({adapter.site.leaf: adapter for adapter in adapters})
        site = adapters[0].site
        ranks = sum(site.layer_rows) // weight.size(0)
        self.rows = [rows // ranks for rows in site.layer_rows]
        self.groups = max(1, site.groups // ranks)
        self.leaf_of_part = {adapter.site.part: adapter.site.leaf for adapter in adapters}

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to the layer's output, in the order of its rows."""
        outputs = {part: self[leaf](x) for part, leaf in self.leaf_of_part.items()}
        like = next(iter(outputs.values()))
        if len(self.rows) == 1:
            return like
        parts = [
            outputs[part] if part in outputs else like.new_zeros(*like.shape[:-1], rows)
            for part, rows in enumerate(self.rows)
        ]
        return torch.cat([part.unflatten(-1, (self.groups, -1)) for part in parts], dim=-1).flatten(-2)


class ExpertAdapters(nn.ModuleList):
    """The adapters of a linear layer that holds all experts of a rank, one `LinearAdapters` per expert."""

    def forward(self, x: Tensor, tokens_per_expert: Sequence[int]) -> Tensor:
        """Return what is added to the layer's output for tokens that are sorted by expert."""
        parts = x.split(list(tokens_per_expert))
        return torch.cat([adapters(part) for adapters, part in zip(self, parts, strict=True)])


def adapters_of(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """Yield the adapters that a model, or a part of it, holds, with their names in it."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Adapter))


# --- checkpoints ------------------------------------------------------------------------------------------------------


def sharded_adapters(model: nn.Module) -> ShardedStateDict:
    """Return what this rank writes of a checkpoint of adapters, and reads again, by the model's own names.

    The frozen weights are not part of it.
    """
    state: ShardedStateDict = {}
    data_parallel_rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    expert_replica = parallel_state.get_expert_data_parallel_rank()
    for name, adapter in adapters_of(model):
        for factor in adapter.factors:
            local = f"{name}.{factor}"
            dim = adapter.split_dim(factor)
            offsets = [] if dim is None else [(dim, adapter.group.rank(), adapter.group.size())]
            replica = (0, 0 if dim is not None else tensor_rank, data_parallel_rank)
            if adapter.site.expert is not None:
                replica = (0, 0, expert_replica)
            key = f"{ADAPTERS}.{canonical_name(model, local)}"
            data = adapter.get_parameter(factor)
            state[local] = ShardedTensor.from_rank_offsets(key, data, *offsets, replica_id=replica)
    return state
