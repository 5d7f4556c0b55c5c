"""The policy's own log-probabilities of drawn tokens, before the first update of an iteration, and the engine's gap.

They come from the same packs and the same kernels as the updates, so that in the first update the ratio of new to old
is exactly 1. The engine that drew the tokens computes with other kernels, perhaps in another precision: importance
weights correct for that, and the gap is reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from data_pipeline.encoding.batch import Batch
from model.context_slicing import my_context_tokens
from rl.policy_batch import PolicyBatch
from training.step import TrainStep
from training.validation import evaluation, forward_packs


def log_probs_of(trainer: TrainStep, batches: Sequence[Batch]) -> list[Tensor]:
    """Return the log-probability of every label of packs, as the policy stands. Collective.

    Args:
        trainer: the policy in its layout.
        batches: the packs of this rank's data-parallel rank.

    Returns:
        float32 [tokens] each, in main memory, on every process.
    """
    if not batches:
        return []
    with evaluation(trainer):
        found = forward_packs(trainer, batches, _in_place)
    values = torch.zeros(len(batches), trainer.seq_length, device=torch.cuda.current_device())
    if found:
        values = torch.stack(found)
        dist.all_reduce(values, group=parallel_state.get_context_parallel_group())
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast(values, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    return list(values.cpu())


def _in_place(batch: Batch, losses: Tensor, non_loss_data: bool) -> Tensor:
    """Return the log-probabilities [tokens] of a pack, 0 where another context rank has them."""
    values = torch.zeros(len(batch.labels), device=losses.device)
    values[my_context_tokens(batch.cu_seqlens).to(losses.device)] = -losses.float()
    return values


def with_old_log_probs(batch: PolicyBatch, log_probs: Tensor, limit: float) -> PolicyBatch:
    """Return a pack that knows the policy's log-probabilities, and the importance weights that follow.

    Args:
        batch: the pack.
        log_probs: float32 [tokens], of its labels.
        limit: most that an importance weight may be; 0: all are 1.
    """
    is_drawn = batch.weights > 0
    old = torch.where(is_drawn, log_probs, 0.0)
    importance = is_drawn.float()
    if limit:
        importance *= (old - batch.engine_log_probs).exp().clamp(max=limit)
    return replace(batch, old_log_probs=old, importance=importance)


@dataclass(frozen=True)
class Mismatch:
    """How far the engine's log-probabilities of drawn tokens are from the policy's, over the global batch."""

    mean: float  # of the absolute difference of log-probabilities
    largest: float
    kl: float  # mean of ratio - 1 - log ratio: divergence of the policy from the engine
    truncated: float  # share of importance weights at their limit

    def metrics(self) -> dict[str, float]:
        """Return the values by key of metrics.jsonl."""
        return {
            "rollout/mismatch": self.mean,
            "rollout/max_mismatch": self.largest,
            "rollout/mismatch_kl": self.kl,
            "rollout/truncated_importance": self.truncated,
        }


def mismatch(batches: Sequence[PolicyBatch], limit: float) -> Mismatch:
    """Compare the engine with the policy on packs with old log-probabilities. Collective over data-parallel ranks.

    Args:
        batches: the packs of this rank's data-parallel rank.
        limit: of importance weights; 0: there are none.
    """
    sums, largest = torch.zeros(4, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for batch in batches:
        is_drawn = batch.weights > 0
        gap = (batch.old_log_probs - batch.engine_log_probs)[is_drawn].double()
        at_limit = (gap.exp() >= limit).sum().item() if limit else 0
        kl = (gap.exp() - 1 - gap).sum().item()
        sums += torch.tensor([gap.abs().sum().item(), kl, at_limit, len(gap)], dtype=torch.float64)
        largest = torch.maximum(largest, gap.abs().max().reshape(1)) if len(gap) else largest
    device, group = torch.cuda.current_device(), parallel_state.get_data_parallel_group()
    sums, largest = sums.to(device), largest.to(device)
    dist.all_reduce(sums, group=group)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    total, kl, truncated, tokens = sums.tolist()
    tokens = max(tokens, 1)
    return Mismatch(total / tokens, largest.item(), kl / tokens, truncated / tokens)
