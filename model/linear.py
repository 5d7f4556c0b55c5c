"""Linear layers of the torch backend: megatron-core's, and one for all experts of a rank.

A weight's gradient is a matrix product. Where DDP keeps gradients in the dtype of the product, the product itself adds
to DDP's buffer, so that the gradient is not written, read and added once more. Elsewhere (bf16 weights with fp32
gradients, or no DDP) autograd gets the gradient as usual. megatron-core has the first as `gradient_accumulation_fusion`
for NVIDIA apex's kernel; here torch does it (`model.cpu.complete_megatron_without_apex`).

The experts' layer multiplies tokens that are sorted by expert:

    tokens_per_expert = [2, 0, 3]      rows 0 1     times weight0, transposed
                                       rows 2 3 4   times weight2, transposed
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import divide
from torch import Tensor, nn


def takes_products(weight: Any) -> bool:
    """Return whether DDP keeps a weight's gradient in a buffer that a product of its own dtype can add to."""
    main_grad = getattr(weight, "main_grad", None)
    return main_grad is not None and main_grad.dtype == weight.dtype


class WeightGradient:
    """The gradient of a weight in a backward pass: DDP's buffer, or a new tensor.

    Args:
        weight: [rows, in].
    """

    def __init__(self, weight: Any) -> None:
        self.weight, self.in_buffer = weight, takes_products(weight)
        self.total = weight.main_grad if self.in_buffer else torch.empty_like(weight)

    def add(self, grad: Tensor, x: Tensor, part: slice = slice(None)) -> None:
        """Add the gradient of a part of the rows; each row is in one part.

        Args:
            grad: Gradient of the output, [tokens, rows of the part].
            x: [tokens, in].
            part: The rows.
        """
        total = self.total[part]
        torch.addmm(total, grad.t(), x, beta=int(self.in_buffer), out=total)

    def result(self) -> Tensor:
        """Return what autograd gets; if DDP's buffer has the gradient, a tensor whose content nobody reads."""
        if not self.in_buffer:
            return self.total
        self.weight.grad_added_to_main_grad = True
        return torch.empty_like(self.weight)


class ColumnLinear(ColumnParallelLinear):
    """megatron-core's layer whose weight's gradient is added to DDP's buffer where that is possible."""

    def _forward_impl(self, input: Tensor, weight: Tensor, **options: Any) -> Tensor:
        return super()._forward_impl(
            input, weight, **options | {"gradient_accumulation_fusion": takes_products(weight)}
        )


class RowLinear(RowParallelLinear):
    """megatron-core's layer whose weight's gradient is added to DDP's buffer where that is possible."""

    def _forward_impl(self, input: Tensor, weight: Tensor, **options: Any) -> Tensor:
        return super()._forward_impl(
            input, weight, **options | {"gradient_accumulation_fusion": takes_products(weight)}
        )


# --- experts ----------------------------------------------------------------------------------------------------------


class GroupedProduct(torch.autograd.Function):
    """Multiplies tokens that are sorted by expert by the transposed weights of their experts.

    One product per expert, in place in the results. torch's `grouped_mm` would need the weights as one tensor, and
    returns their gradient as another: on a CPU in float32 it takes 1.1 to 1.4 times as long. Not measured on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens_per_expert: Sequence[int], *weights: Tensor) -> Tensor:
        """Return [tokens, rows of a weight].

        Args:
            ctx: Keeps what the backward pass needs.
            x: [tokens, in].
            tokens_per_expert: Tokens of each expert.
            weights: [rows, in] of each expert.
        """
        ctx.save_for_backward(x, *weights)
        ctx.tokens_per_expert = tokens_per_expert
        out = x.new_empty(len(x), weights[0].size(0))
        for weight, rows in zip(weights, slices(tokens_per_expert), strict=True):
            torch.mm(x[rows], weight.t(), out=out[rows])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Return the gradients of tokens and weights."""
        x, *weights = ctx.saved_tensors
        of_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        of_weights: list[Tensor | None] = [None] * len(weights)
        for expert, (weight, rows) in enumerate(zip(weights, slices(ctx.tokens_per_expert), strict=True)):
            if of_x is not None:
                torch.mm(grad[rows], weight, out=of_x[rows])
            if weight.requires_grad:
                gradient = WeightGradient(weight)
                gradient.add(grad[rows], x[rows])
                of_weights[expert] = gradient.result()
        return of_x, None, *of_weights


def slices(tokens_per_expert: Sequence[int]) -> list[slice]:
    """Return the rows of each expert.

    >>> slices([2, 0, 3])
    [slice(0, 2, None), slice(2, 2, None), slice(2, 5, None)]
    """
    ends = list(accumulate(tokens_per_expert))
    return [slice(end - count, end) for count, end in zip(tokens_per_expert, ends, strict=True)]


class GroupedLinear(nn.Module):
    """A linear layer of all experts of a rank, for megatron-core's grouped experts; no bias.

    Parameters and checkpoints have the names of Transformer Engine's layer: `weight0`, `weight1` ...

    Args:
        num_gemms: Experts of this rank.
        input_size: Width of a whole expert's input.
        output_size: Width of a whole expert's output.
        config: megatron-core's configuration.
        init_method: Fills a weight.
        pg_collection: Process groups.
        options: Of megatron-core, for other kinds of layers.
    """

    split_dim: int  # of a weight, over expert-tensor ranks

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[Tensor], object],
        pg_collection: Any,
        **options: Any,
    ) -> None:
        super().__init__()
        self.num_gemms, self.groups = num_gemms, pg_collection
        shape = [output_size, input_size]
        shape[self.split_dim] = divide(shape[self.split_dim], pg_collection.expt_tp.size())
        for expert in range(num_gemms):
            weight = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=torch.cuda.current_device()))
            set_tensor_model_parallel_attributes(weight, True, self.split_dim, 1)
            if config.perform_initialization:
                init_method(weight.data)
            self.register_parameter(f"weight{expert}", weight)

    def forward(self, x: Tensor, tokens_per_expert: Sequence[int]) -> tuple[Tensor, None]:
        """Map tokens [tokens, in], sorted by expert, to [tokens, out]; the second value is megatron-core's bias."""
        return GroupedProduct.apply(x, tokens_per_expert, *self.parameters(recurse=False)), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Return the weights as megatron-core's checkpoints hold them: stacked over all experts of the model."""
        assert metadata is not None
        first = self.groups.ep.rank() * self.num_gemms
        of_all = self.groups.ep.size() * self.num_gemms
        state: ShardedStateDict = {}
        for expert in range(self.num_gemms):
            sharded = make_sharded_tensors_for_checkpoint(
                {f"{expert}.weight": self.get_parameter(f"weight{expert}")},
                "",
                {f"{expert}.weight": self.split_dim},
                (*sharded_offsets, (len(sharded_offsets), first + expert, of_all)),
                tp_group=self.groups.expt_tp,
                dp_cp_group=metadata["dp_cp_group"],
            )
            replace_prefix_for_sharding(sharded, f"{expert}.", prefix)
            weight = sharded[f"{expert}.weight"]
            weight.replica_id = (*weight.replica_id[:2], self.groups.expt_dp.rank())
            state[f"{prefix}weight{expert}"] = weight
        return state


class ColumnGroupedLinear(GroupedLinear):
    """The experts' layer whose rows are split over expert-tensor ranks."""

    split_dim = 0


class RowGroupedLinear(GroupedLinear):
    """The experts' layer whose columns are split over expert-tensor ranks; megatron-core's dispatcher adds up."""

    split_dim = 1
