"""Output layer and cross-entropy in one, a part of the vocabulary at a time, so that all logits never exist at once.

    tokens x vocabulary      one part      forward:  running maximum and sum of exp(logits) of each token
    [      |      |      ]                 backward: the part's logits again, their gradient, and with it the gradients
                                                     of the part's rows of the weight and of the hidden states

Each part is one matrix product over all tokens, so that every row of the weight's gradient is summed as it would be
without parts. Where one part is enough, its probabilities are kept instead of computed twice.

    T tokens, V vocabulary / TP, H hidden
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from model.linear import WeightGradient

LOGITS_AT_ONCE = 2**25  # float32, so 128 MiB


class OutputLayer(ColumnParallelLinear):
    """megatron-core's output layer, which computes its loss too. It has no bias.

    The weight is read by a call of this module alone, because DDP waits then for the gathering of its parameters.
    """

    def forward(self, hidden_states: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the cross-entropy of every token, or without labels its logits.

        Args:
            hidden_states: [tokens, 1, H]; under sequence parallelism [tokens / TP, 1, H].
            labels: int64 [tokens], on the device of the hidden states.

        Returns:
            Losses, float32 [tokens], the same on all tensor ranks; or logits [tokens, V].
        """
        if labels is None:
            return super().forward(hidden_states)[0].squeeze(1)
        group: Any = self.tp_group
        if self.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=group)
        else:
            hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=group)
        return LinearCrossEntropy.apply(hidden_states.squeeze(1), self.weight, labels, group, LOGITS_AT_ONCE)


class LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of `hidden @ weight.T`, with the vocabulary split over the ranks of a group."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, group: dist.ProcessGroup, logits_at_once: int
    ) -> Tensor:
        """Return the losses, float32 [T].

        Args:
            ctx: What the backward pass needs.
            hidden: [T, H].
            weight: [V, H].
            labels: int64 [T], ids in the whole vocabulary.
            group: Ranks that hold equal parts of the vocabulary, in order.
            logits_at_once: How many logits may exist at a time.
        """
        labels = labels - group.rank() * len(weight)
        highest = hidden.new_full((len(hidden),), -torch.inf, dtype=torch.float32)
        total, predicted = torch.zeros_like(highest), torch.zeros_like(highest)
        parts = _parts(len(hidden), len(weight), logits_at_once)
        for part in parts:
            logits = (hidden @ weight[part].T).float()
            place, present = _places(labels, part)
            predicted += logits.gather(1, place[:, None])[:, 0] * present
            before, highest = highest, torch.maximum(highest, logits.amax(dim=1))
            exponentials = logits.sub_(highest[:, None]).exp_()
            total = total * (before - highest).exp() + exponentials.sum(dim=1)
        if group.size() > 1:
            own_highest = highest.clone()
            dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
            total *= (own_highest - highest).exp()
            dist.all_reduce(total, group=group)
            dist.all_reduce(predicted, group=group)
            if len(parts) == 1:
                exponentials *= (own_highest - highest).exp()[:, None]
        kept = exponentials if len(parts) == 1 else None
        ctx.save_for_backward(hidden, weight, labels, highest, total, kept)
        ctx.parts = parts
        return total.log() - (predicted - highest)

    @staticmethod
    def backward(ctx: Any, losses_gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return this rank's part of the gradient of `hidden`, and the gradient of `weight`."""
        hidden, weight, labels, highest, total, kept = ctx.saved_tensors
        hidden_gradient = torch.zeros_like(hidden, dtype=torch.float32)
        weight_gradient = WeightGradient(weight) if ctx.needs_input_grad[1] else None
        rows = torch.arange(len(hidden), device=hidden.device)
        for part in ctx.parts:
            exponentials = kept
            if exponentials is None:
                exponentials = (hidden @ weight[part].T).float().sub_(highest[:, None]).exp_()
            place, present = _places(labels, part)
            gradient = exponentials * (losses_gradient / total)[:, None]
            gradient[rows, place] -= losses_gradient * present
            gradient = gradient.to(hidden.dtype)
            hidden_gradient += gradient @ weight[part]
            if weight_gradient is not None:
                weight_gradient.add(gradient, hidden, part)
        of_weight = None if weight_gradient is None else weight_gradient.result()
        return hidden_gradient.to(hidden.dtype), of_weight, None, None, None


def _parts(tokens: int, vocabulary: int, logits_at_once: int) -> list[slice]:
    """Return the fewest parts of the vocabulary, of nearly equal size, that keep to the limit."""
    count = -(-tokens * vocabulary // logits_at_once)
    size = -(-vocabulary // max(1, count))
    return [slice(begin, min(begin + size, vocabulary)) for begin in range(0, vocabulary, size)]


def _places(labels: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Return where in a part each label is, 0 for labels elsewhere, and which are in it: int64 [T], bool [T]."""
    place = labels - part.start
    present = (place >= 0) & (place < part.stop - part.start)
    return place * present, present
