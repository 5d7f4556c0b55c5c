"""Compute the loss of a checkpoint on given packs with the training model, without training."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from data_pipeline.domains import DOMAINS
from data_pipeline.encoding.batch import Batch
from model.checkpoint import HF_FILES, find_checkpoint, load_checkpoint
from model.config import GlmvConfig
from model.whole_model import build_whole_model
from training.distributed import process_group
from training.domain_losses import domain_masks
from training.step import forward


def evaluate(checkpoint: Path, packs: Iterable[Batch]) -> dict[str, float]:
    """Return the mean cross-entropy over the tokens that carry loss, in float32 and one process.

    Args:
        checkpoint: Step folder, or a run's folder for its newest step.
        packs: Packs to evaluate on, each of any length.

    Returns:
        `loss`, and `loss/DOMAIN` for every domain present.

    Raises:
        CheckpointError: the folder is no checkpoint, is damaged, or does not load.
    """
    checkpoint = find_checkpoint(checkpoint)
    sums = torch.zeros(len(DOMAINS), 2, dtype=torch.float64)
    with process_group(), torch.no_grad():
        model = build_whole_model(GlmvConfig.from_hf(checkpoint / HF_FILES)).eval()
        load_checkpoint(checkpoint, [model])
        for pack in packs:
            masks = (domain_masks(pack) * pack.loss_mask).double()
            losses = forward(model, pack).cpu().double()
            sums += torch.stack([masks @ losses, masks.sum(1)], dim=1)
    losses_and_counts = dict(zip(DOMAINS, sums.tolist(), strict=True))
    total, count = sums.sum(0).tolist()
    return {"loss": total / count, **{f"loss/{d}": s / n for d, (s, n) in losses_and_counts.items() if n}}
