"""Follows the tensors of a device that has no memory: what is live, and the most that ever was."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten, c10d = torch.ops.aten, torch.ops.c10d
Origin = tuple[str, tuple[int, ...], torch.dtype]  # operation, shape and dtype
UNKNOWN: Origin = ("", (), torch.uint8)
Sent = tuple[str, tuple[int, ...]]  # operation, and the ranks of its group


class MemoryTrace(TorchDispatchMode):
    """Counts the bytes of all storages that live, at every operation.

    Args:
        selected: Share of the places of a routing map that are set; what is selected by a map has a size that depends
            on values, and there are none.
        with_host: Count tensors in main memory, too: where the model runs on CPUs, there is one memory.

    Attributes:
        live: Bytes of the storages that live.
        peak: Most of them since `reset_peak`.
        traffic: Bytes that this rank sends to others, by operation and ranks of the group.
        explain: Whether to keep what lives at the peak, with the operation that made it, in `at_peak`.
        scalars_read: Numbers that the host read from the device, each of which waits for it.
    """

    def __init__(self, selected: float = 1.0, with_host: bool = False) -> None:
        super().__init__()
        self.selected, self.with_host = selected, with_host
        self.live = self.peak = self.scalars_read = 0
        self.traffic: Counter[Sent] = Counter()
        self.explain = False
        self.at_peak: Counter[tuple[int, Origin]] = Counter()
        self._storages: dict[int, Any] = {}
        self._sizes: dict[int, tuple[int, Origin]] = {}

    def reset_peak(self) -> None:
        """Start to look for a new peak."""
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return self._collective(func, args, kwargs)
        answer = ANSWERS.get(func)
        out = func(*args, **kwargs) if answer is None else answer(self, func, args, kwargs)
        self._note(out, func)
        return out

    def _note(self, out: Any, func: Any) -> None:
        for tensor in _tensors(out):
            if tensor.device.type == "meta" or self.with_host:
                self.note(tensor, func)

    def note(self, tensor: Tensor, func: Any = "given") -> None:
        """Count the storage of a tensor, if it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        self._storages[key] = weakref.ref(storage, lambda _: self._forget(key))
        origin = (str(func), tuple(tensor.shape), tensor.dtype) if self.explain else UNKNOWN
        self._resize(key, storage.nbytes(), origin)

    def _resize(self, key: int, size: int, origin: Origin) -> None:
        self.live += size - self._sizes.pop(key, (0, origin))[0]
        self._sizes[key] = size, origin
        if self.live > self.peak:
            self.peak = self.live
            if self.explain:
                self.at_peak = Counter(self._sizes.values())

    def _forget(self, key: int) -> None:
        self._storages.pop(key, None)
        self.live -= self._sizes.pop(key, (0, None))[0]

    def __enter__(self) -> MemoryTrace:
        # Recomputed outputs are freed, and allocated again, by their storage.
        true_resize = torch.UntypedStorage.resize_

        def resize(storage: Any, size: int) -> Any:
            result = true_resize(storage, size)
            if storage._cdata in self._sizes:
                self._resize(storage._cdata, size, self._sizes[storage._cdata][1])
            return result

        self._patch = mock.patch.object(torch.UntypedStorage, "resize_", resize)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *reason: Any) -> None:
        super().__exit__(*reason)
        self._patch.stop()

    def _collective(self, func: Any, args: Any, kwargs: Any) -> Any:
        operation = OPERATIONS.get(func)
        if operation is not None:
            ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(args[operation.group]))
            size = sum(x.nbytes for x in _tensors(args[operation.tensors]))
            self.traffic[operation.name, tuple(ranks)] += int(size * operation.share(len(ranks)))
        if func in COALESCED:
            return torch._C._distributed_c10d.FakeWork().boxed()
        return func(*args, **kwargs)


def _tensors(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, list | tuple):
        for one in out:
            yield from _tensors(one)


class Operation(NamedTuple):
    """How many bytes a rank sends in a collective operation, by the ring algorithm."""

    name: str
    tensors: int  # which argument holds the tensors whose bytes count
    group: int  # which argument is the group
    share: Callable[[int], float]  # bytes sent over the bytes of the tensors, for a group of n ranks


ALL_GATHER = partial(Operation, "all_gather", share=lambda n: n - 1)  # of the rank's own part
REDUCE_SCATTER = partial(Operation, "reduce_scatter", share=lambda n: (n - 1) / n)  # of the whole
ALL_REDUCE = partial(Operation, "all_reduce", share=lambda n: 2 * (n - 1) / n)
OPERATIONS = {
    c10d.allreduce_.default: ALL_REDUCE(0, 1),
    c10d.allreduce_coalesced_.default: ALL_REDUCE(0, 1),
    c10d._allgather_base_.default: ALL_GATHER(1, 2),
    c10d.allgather_into_tensor_coalesced_.default: ALL_GATHER(1, 2),
    c10d._reduce_scatter_base_.default: REDUCE_SCATTER(1, 2),
    c10d.reduce_scatter_tensor_coalesced_.default: REDUCE_SCATTER(1, 2),
    c10d.alltoall_base_.default: Operation("all_to_all", 1, 2, lambda n: (n - 1) / n),
    c10d.broadcast_.default: Operation("broadcast", 0, 1, lambda n: 1),
    c10d.send.default: Operation("send", 0, 1, lambda n: 1),
}
COALESCED = {
    c10d.allreduce_coalesced_.default,
    c10d.allgather_into_tensor_coalesced_.default,
    c10d.reduce_scatter_tensor_coalesced_.default,
}


def _selected(trace: MemoryTrace, func: Any, args: Any, kwargs: Any) -> Tensor:
    source, mask = args
    if source.device.type != "meta":
        return func(*args, **kwargs)
    return source.new_empty(round(mask.numel() * trace.selected))


def _scalar(trace: MemoryTrace, func: Any, args: Any, kwargs: Any) -> Any:
    (tensor,) = args
    if tensor.device.type != "meta":
        return func(*args, **kwargs)
    trace.scalars_read += 1
    assert tensor.is_floating_point(), "a size on the device would be needed"
    return 1.0


def _no_counts(trace: MemoryTrace, func: Any, args: Any, kwargs: Any) -> Tensor:
    if not args[0].is_meta:
        return func(*args, **kwargs)
    return torch.zeros(args[2] if len(args) > 2 else kwargs["minlength"], dtype=torch.int64)


Answer = Callable[[MemoryTrace, Any, Any, Any], Any]
ANSWERS: dict[Any, Answer] = {
    aten.masked_select.default: _selected,
    aten._local_scalar_dense.default: _scalar,
    aten.bincount.default: _no_counts,
}
