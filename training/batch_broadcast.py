"""One process reads the packs that the tensor, context and pipeline ranks of a data-parallel rank work on.

The first of them (the lead) has the loader; its data workers are the only ones. Token ids, positions, masks and names
of samples go to all of them, through main memory; patches, which are a hundred times larger, only to the first pipeline
stage, one pack at a time and from device to device. A sample that cannot be read is thus missed by all alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from data_pipeline.encoding.batch import Batch
from model.parallel import same_packs_group


def is_lead() -> bool:
    """Whether this process reads packs."""
    return same_packs_group().rank() == 0


def broadcast_batches(read: Callable[[], list[Batch]]) -> list[Batch]:
    """What `read` returns on the lead, on every process that works on the same packs; the others' patches are left to
    `broadcast_patches`. What `read` raises, all raise. Collective."""
    group = same_packs_group()
    if group.size() == 1:
        return read()
    batches: list[Batch] = []
    outcome: list[Any] = [None]
    if is_lead():
        try:
            batches = read()
            outcome = [[replace(batch, patches=batch.patches[:0]) for batch in batches]]
        except Exception as error:  # the others wait for an answer
            outcome = [error]
    dist.broadcast_object_list(outcome, src=dist.get_global_rank(group, 0), group=group)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return batches or outcome[0]


def broadcast_patches(batches: Sequence[Batch]) -> Iterator[Batch]:
    """The packs with their patches, on every tensor and context rank of the first pipeline stage. Collective there."""
    group, device = parallel_state.get_tensor_and_context_parallel_group(), torch.cuda.current_device()
    for batch in batches:
        if group.size() > 1:
            if group.rank() == 0:
                patches = batch.patches.to(device, non_blocking=True)
            else:
                slices = int((batch.grid_thw.prod(dim=1) * batch.frames_per_image).sum())
                patches = torch.empty(slices, batch.patches.size(1), dtype=torch.uint8, device=device)
            dist.broadcast(patches, src=dist.get_global_rank(group, 0), group=group)
            batch = replace(batch, patches=patches)
        yield batch
