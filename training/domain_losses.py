"""The loss of each domain, and of all: summed over the packs of a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from data_pipeline.domains import DOMAINS
from data_pipeline.encoding.batch import Batch


def domain_masks(batch: Batch) -> Tensor:
    """Return float32 [domains, tokens]: 1 where a token's segment is of the domain."""
    masks = torch.zeros(len(DOMAINS), batch.input_ids.numel())
    bounds = batch.cu_seqlens.tolist()
    for domain, begin, end in zip(batch.segment_domains, bounds, bounds[1:], strict=False):
        if domain:
            masks[DOMAINS.index(domain), begin:end] = 1
    return masks


def reduce_losses(reports: Sequence[dict[str, Tensor]]) -> tuple[float, dict[str, float]]:
    """Return the mean loss over the loss tokens of the global batch: overall, and of each domain present. Collective.

    Args:
        reports: those of this rank's micro-batches; empty except on the last pipeline stage.
    """
    sums = torch.zeros(len(DOMAINS), 2, device=torch.cuda.current_device())
    if reports:
        sums = torch.stack([report["domains"] for report in reports]).sum(0)
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast(sums, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    totals, counts = sums.double().T.tolist()
    loss = sum(totals) / sum(counts)
    return loss, {d: t / c for d, t, c in zip(DOMAINS, totals, counts, strict=True) if c}
