"""Tensors made of rows of other tensors: new names, matrices cut out of a larger one, or set above each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.errors import WeightsError
from model.weights.source import WeightSource, some

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Span:
    """Rows [start, stop) of a tensor."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Made:
    """A tensor that consists of the rows of spans, one above the other."""

    spans: tuple[Span, ...]
    shape: tuple[int, ...]
    change: Change | None = None  # of each block of rows, which keeps their number


class Rearranged:
    """A source of tensors that are made of the rows of another source's.

    Args:
        source: The tensors to read.
        tensors: How each tensor is made, by its new name.
    """

    def __init__(self, source: WeightSource, tensors: Mapping[str, Made]) -> None:
        self.source = source
        self._tensors = dict(tensors)

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of one tensor."""
        return self.source.dtype(self._tensors[name].spans[0].name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of one tensor, reading the same number of rows of its spans."""
        made = self._tensors[name]
        read = []
        position = 0
        for span in made.spans:
            begin, end = max(start, position), min(stop, position + span.stop - span.start)
            if begin < end:
                read.append(self.source.rows(span.name, span.start + begin - position, span.start + end - position))
            position += span.stop - span.start
        rows = torch.cat(read) if len(read) != 1 else read[0]
        return made.change(rows) if made.change else rows

    def where(self, name: str) -> str:
        """Return where one tensor comes from."""
        return ", ".join(dict.fromkeys(self.source.where(span.name) for span in self._tensors[name].spans))


def whole_tensor(source: WeightSource, name: str) -> Made:
    """Return a tensor as it is in `source`."""
    return stacked(source, name)


def stacked(source: WeightSource, *names: str, change: Change | None = None) -> Made:
    """Return tensors of a source set above each other, each block of rows changed by `change`."""
    shapes = [source.shape(name) for name in names]
    spans = tuple(Span(name, 0, shape[0]) for name, shape in zip(names, shapes, strict=True))
    shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    return Made(spans, tuple(change(torch.empty(shape, device="meta")).shape) if change else shape, change)


def chosen(source: WeightSource, names: Iterable[str]) -> Rearranged:
    """Return a source that has only some of the tensors."""
    return Rearranged(source, {name: whole_tensor(source, name) for name in names})


class Joined:
    """Several sources as one. No name may be in two of them."""

    def __init__(self, sources: Iterable[WeightSource]) -> None:
        self._source_of: dict[str, WeightSource] = {}
        for source in sources:
            if twice := [name for name in source.names() if name in self._source_of]:
                raise WeightsError(f"two sources of weights have {some(twice)}")
            self._source_of.update(dict.fromkeys(source.names(), source))

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._source_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor."""
        return self._source_of[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of one tensor."""
        return self._source_of[name].dtype(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of one tensor."""
        return self._source_of[name].rows(name, start, stop)

    def where(self, name: str) -> str:
        """Return where one tensor comes from."""
        return self._source_of[name].where(name)
