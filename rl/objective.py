"""The policy loss: clipped policy gradients, with the mean over a rollout's tokens and then over rollouts.

    loss = - 1/N  sum over the N rollouts of an update
                  1/T  sum over the T drawn tokens of a rollout
                       importance * min(ratio * A, clamp(ratio, 1 - clip_low, 1 + clip_high) * A)

with A the advantage of the rollout and ratio = exp(log-probability now - before the first update). There is no term for
the divergence from a reference and none for the entropy. The loss is that of the GLM-4.5V report (section 5.3), which
gives no clip values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from data_pipeline.encoding.batch import Batch
from model.context_slicing import my_context_tokens
from model.to_device import to_device
from rl.policy_batch import PolicyBatch
from training.objective import Losses, PackReport

# What is summed over rollouts with the weights of the loss, and reported as a mean.
MEANS = ("loss", "policy/clip_fraction", "policy/kl", "policy/entropy")
LARGEST = "policy/max_ratio_deviation"


@dataclass(frozen=True)
class PolicyLoss:
    """The objective of reinforcement learning.

    Attributes:
        clip_low: how far below 1 the ratio may pull a token.
        clip_high: how far above 1.
    """

    clip_low: float
    clip_high: float

    def count(self, batch: Batch) -> int:
        """Return the number of rollouts."""
        return batch.num_samples

    def sum(self, batch: Batch, losses: Tensor) -> tuple[Tensor, PackReport]:
        """Return the sum over rollouts of the mean over their tokens, and what `reduce` takes.

        Reported are the share of tokens whose gradient is clipped away, the divergence of the policy from the one
        before the first update (the estimate ratio - 1 - log ratio), and the mean of minus the log-probability of drawn
        tokens, an estimate of the entropy.
        """
        assert isinstance(batch, PolicyBatch)
        tokens = my_context_tokens(batch.cu_seqlens)
        weights, advantages, old, importance = (
            to_device(values[tokens])
            for values in (batch.weights, batch.advantages, batch.old_log_probs, batch.importance)
        )
        is_drawn = weights > 0
        # Without the selection, the padding's log-probabilities could overflow to 0 * infinity.
        log_ratio = torch.where(is_drawn, -losses - old, 0.0)
        ratio = log_ratio.exp()
        gain = ratio * advantages
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high) * advantages
        terms = -torch.minimum(gain, clipped) * importance * weights
        with torch.no_grad():
            is_clipped = (clipped < gain).float()
            means = [terms, is_clipped * weights, (ratio - 1 - log_ratio) * weights, losses * weights]
            rollouts = batch.num_samples / parallel_state.get_context_parallel_world_size()
            sums = torch.stack([*(values.sum() for values in means), terms.new_tensor(rollouts)])
            largest = (ratio - 1).abs().max()
        return terms.sum(), {"sums": sums.double(), "largest": largest.double()}

    def reduce(self, reports: Sequence[PackReport]) -> Losses:
        """Return the loss and what is reported beside it. Collective."""
        device = torch.cuda.current_device()
        sums = torch.zeros(len(MEANS) + 1, dtype=torch.float64, device=device)
        largest = torch.zeros(1, dtype=torch.float64, device=device)
        if reports:
            sums = torch.stack([report["sums"] for report in reports]).sum(0)
            largest = torch.stack([report["largest"] for report in reports]).max().reshape(1)
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            dist.all_reduce(sums, group=group)
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        for values in (sums, largest):
            dist.broadcast(values, src=last, group=parallel_state.get_pipeline_model_parallel_group())
        *totals, rollouts = sums.tolist()
        means = {name: total / rollouts for name, total in zip(MEANS, totals, strict=True)}
        return Losses(means.pop("loss"), metrics={**means, LARGEST: largest.item()})
