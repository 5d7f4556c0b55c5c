"""One process per data-parallel rank, the lead, reads packs; its tensor, context and pipeline ranks receive them.

Only the lead has a loader and data workers. It broadcasts token ids, positions, masks and sample ids to all these ranks
through main memory. Patches are a hundred times larger: only the first pipeline stage receives them, one pack at a time
and from device to device. The lead copies those of the next pack to its device while the device computes the present
one. So a sample that cannot be read is quarantined for all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from data_pipeline.encoding.batch import Batch
from data_pipeline.errors import Interrupted
from data_pipeline.loading.loader import PackedLoader
from model.process_groups import same_packs_group
from model.to_device import to_device


def is_lead() -> bool:
    """Return whether this process reads packs."""
    return same_packs_group().rank() == 0


Pack = TypeVar("Pack", bound=Batch)


def broadcast_batches(read: Callable[[], list[Pack]]) -> list[Pack]:
    """Read batches on the lead and return them on every process that works on the same packs. Collective.

    Processes other than the lead get them without patches, which `broadcast_patches` sends.

    Args:
        read: Reads the batches; called on the lead only. All processes raise what it raises.
    """
    group = same_packs_group()
    if group.size() == 1:
        return read()
    batches: list[Pack] = []
    outcome: list[Any] = [None]
    if is_lead():
        try:
            batches = read()
            outcome = [[without_patches(batch) for batch in batches]]
        except Exception as error:  # the other processes wait for the outcome
            outcome = [error]
    dist.broadcast_object_list(outcome, src=dist.get_global_rank(group, 0), group=group)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return batches or outcome[0]


def without_patches(batch: Pack) -> Pack:
    """Return a pack without its patches. They are replaced and not sliced: a slice is sent with all that it is of."""
    return replace(batch, patches=batch.patches.new_empty(0, batch.patches.size(1)))


def read_step(loader: PackedLoader) -> list[Batch]:
    """Read the next step's packs as `broadcast_batches` does. Collective.

    Returns:
        The packs; none where the data has ended, or where the lead was asked to stop while it waited for lost storage.
    """
    try:
        return broadcast_batches(loader.next_step)
    except Interrupted:
        return []


def broadcast_patches(batches: Sequence[Batch]) -> Iterator[Batch]:
    """Yield the packs with their patches, on every tensor and context rank of the first stage. Collective there.

    The patches are on the device.
    """
    group, device = parallel_state.get_tensor_and_context_parallel_group(), torch.cuda.current_device()
    copies = copied_ahead([batch.patches for batch in batches] if group.rank() == 0 else [])
    for batch in batches:
        if group.rank() == 0:
            patches = next(copies)
        else:
            slices = int((batch.grid_thw.prod(dim=1) * batch.frames_per_image).sum())
            patches = torch.empty(slices, batch.patches.size(1), dtype=torch.uint8, device=device)
        if group.size() > 1:
            dist.broadcast(patches, src=dist.get_global_rank(group, 0), group=group)
        yield replace(batch, patches=patches)


def copied_ahead(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield tensors on the device. The copy of each begins when the one before is asked for, on a stream of its own."""
    stream = copy_stream()

    def begin(tensor: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        with torch.cuda.stream(stream):
            return to_device(tensor), stream.record_event()

    begun = [begin(tensor) for tensor in tensors[:1]]
    for number in range(len(tensors)):
        begun += [begin(tensor) for tensor in tensors[number + 1 : number + 2]]
        copied, done = begun.pop(0)
        torch.cuda.current_stream().wait_event(done)
        copied.record_stream(torch.cuda.current_stream())  # its memory is not given away before this stream has used it
        yield copied


@cache
def copy_stream() -> Any:
    """Return the stream of copies to the device."""
    return torch.cuda.Stream()
