"""What a step minimises. A stage that learns from something else than the next token hands TrainStep another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from data_pipeline.encoding.batch import Batch
from model.context_slicing import my_context_tokens
from model.to_device import to_device
from training.domain_losses import domain_masks, reduce_losses

PackReport = dict[str, Tensor]  # sums over one pack, on the last pipeline stage


@dataclass(frozen=True)
class Losses:
    """The loss of a step, over the global batch."""

    loss: float
    by_domain: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)  # what else the objective reports, by key of metrics.jsonl


class Objective(Protocol):
    """A loss that is a sum over packs, divided by a count over the global batch that is known before the backward."""

    def count(self, batch: Batch) -> int:
        """Return what a pack adds to the count by which the sum of the losses is divided."""

    def sum(self, batch: Batch, losses: Tensor) -> tuple[Tensor, PackReport]:
        """Return the sum for the backward pass, and sums that `reduce` takes.

        Args:
            batch: the pack.
            losses: minus the log-probability of each label of this context rank, float32 [tokens / CP].
        """

    def reduce(self, reports: Sequence[PackReport]) -> Losses:
        """Return the loss over the global batch. Collective.

        Args:
            reports: those of this rank's packs; empty except on the last pipeline stage.
        """


class CrossEntropy:
    """The mean over the tokens that carry loss, overall and by domain."""

    def count(self, batch: Batch) -> int:
        """Return the tokens that carry loss."""
        return batch.num_loss_tokens

    def sum(self, batch: Batch, losses: Tensor) -> tuple[Tensor, PackReport]:
        """Return the sum over the tokens that carry loss, and sums and counts by domain, [domains, 2]."""
        tokens = my_context_tokens(batch.cu_seqlens)
        mask = to_device(batch.loss_mask[tokens])
        of_domain = to_device(domain_masks(batch)[:, tokens]) * mask
        report = torch.stack([of_domain @ losses.detach(), of_domain.sum(1)], dim=1)
        return (losses * mask).sum(), {"domains": report}

    def reduce(self, reports: Sequence[PackReport]) -> Losses:
        """Return the means. Collective."""
        return Losses(*reduce_losses(reports))
