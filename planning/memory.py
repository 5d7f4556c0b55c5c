"""Follows the tensors of a device that has no memory: what is live, and the most that ever was."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten, c10d = torch.ops.aten, torch.ops.c10d


class MemoryTrace(TorchDispatchMode):
    """Counts the bytes of all storages that live, at every operation.

    Args:
        selected: Share of the places of a routing map that are set; what is selected by a map has a size that depends
            on values, and there are none.
        with_host: Count tensors in main memory, too: where the model runs on CPUs, there is one memory.

    Attributes:
        live: Bytes of the storages that live.
        peak: Most of them since `reset_peak`.
        traffic: Bytes that this rank sends to others, by the ranks of the group and the operation.
        scalars_read: Numbers that the host read from the device, each of which waits for it.
    """

    def __init__(self, selected: float = 1.0, with_host: bool = False) -> None:
        super().__init__()
        self.selected, self.with_host = selected, with_host
        self.live = self.peak = self.scalars_read = 0
        self.traffic: Counter[tuple[tuple[int, ...], str]] = Counter()
        self.at_peak: Counter[tuple[str, tuple[int, ...], torch.dtype]] = Counter()
        self._storages: dict[int, Any] = {}
        self._origins: dict[int, tuple[str, tuple[int, ...], torch.dtype, int]] = {}
        self.keep_origins = False

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
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self._storages[key] = weakref.ref(storage, lambda _: self._forget(key, size))
        self.live += size
        if self.keep_origins:
            self._origins[key] = (str(func), tuple(tensor.shape), tensor.dtype, size)
        if self.live > self.peak:
            self.peak = self.live
            if self.keep_origins:
                self.at_peak = Counter(self._origins.values())

    def _forget(self, key: int, size: int) -> None:
        self._storages.pop(key, None)
        self._origins.pop(key, None)
        self.live -= size

    def _collective(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in COALESCED:
            return torch._C._distributed_c10d.FakeWork().boxed()
        return func(*args, **kwargs)


def _tensors(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, list | tuple):
        for one in out:
            yield from _tensors(one)


COALESCED = {
    c10d.allreduce_coalesced_.default,
    c10d.allgather_into_tensor_coalesced_.default,
    c10d.reduce_scatter_tensor_coalesced_.default,
}
FLASH_ATTENTION = 1  # torch's number of the kernel


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


def _attention_kernel(trace: MemoryTrace, func: Any, args: Any, kwargs: Any) -> int:
    return FLASH_ATTENTION


Answer = Callable[[MemoryTrace, Any, Any, Any], Any]
ANSWERS: dict[Any, Answer] = {
    aten.masked_select.default: _selected,
    aten._local_scalar_dense.default: _scalar,
    aten.bincount.default: _no_counts,
    aten._fused_sdp_choice.default: _attention_kernel,
}
