"""In which order a parameter's rows come from the tensors of a Hugging Face folder.

Every parameter consists of whole rows of those tensors, whatever its other dimensions are. So one description serves
both directions, a few rows as well as all of them, and a tensor rank's slice:

    4 queries on 2 groups, head_dim 1    q0 q1 k0 v0 | q2 q3 k1 v1
    the first group's pieces             Piece(0, 0, 2), Piece(1, 0, 1), Piece(2, 0, 1)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Piece(NamedTuple):
    """Rows [start, stop) of one of the folder's tensors."""

    part: int
    start: int
    stop: int


@dataclass(frozen=True)
class Transform:
    """Both directions between the tensors of a folder and one parameter."""

    order: Callable[[Sequence[int], Mapping[str, int]], Iterator[Piece]]  # (rows of each tensor, sizes) -> all pieces
    stacked: int = 1  # matrices above each other in the parameter, which tensor parallelism splits one by one

    def pieces(self, rows: Sequence[int], size: Mapping[str, int], start: int, stop: int) -> Iterator[Piece]:
        """Yield what makes the rows [start, stop) of the parameter, in their order.

        Args:
            rows: Rows of each tensor of the folder.
            size: The named sizes of the table of weights.
            start: First row of the parameter.
            stop: The row after the last.
        """
        position = 0
        for part, first, last in self.order(rows, size):
            begin, end = max(start, position), min(stop, position + last - first)
            if begin < end:
                yield Piece(part, first + begin - position, first + end - position)
            position += last - first

    def places(
        self, rows: Sequence[int], size: Mapping[str, int], part: int, start: int, stop: int
    ) -> Iterator[tuple[int, int]]:
        """Yield where the parameter has the rows [start, stop) of one of the folder's tensors, in their order.

        Args:
            rows: Rows of each tensor of the folder.
            size: The named sizes of the table of weights.
            part: Which of those tensors.
            start: Its first row.
            stop: The row after the last.
        """
        position, found = 0, []
        for piece in self.order(rows, size):
            if piece.part == part:
                found.append((piece, position))
            position += piece.stop - piece.start
        for piece, position in sorted(found):
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first < last:
                yield position + first - piece.start, position + last - piece.start

    def to_megatron(self, parts: Sequence[Tensor], size: Mapping[str, int]) -> Tensor:
        """Return the parameter that whole tensors of the folder make."""
        rows = [part.size(0) for part in parts]
        return torch.cat([parts[part][start:stop] for part, start, stop in self.order(rows, size)])

    def to_hf(self, joined: Tensor, rows: Sequence[int], size: Mapping[str, int]) -> list[Tensor]:
        """Return the tensors of the folder, of `rows` rows each, that make a whole parameter."""
        parts = [joined.new_empty((count, *joined.shape[1:])) for count in rows]
        position = 0
        for part, start, stop in self.order(rows, size):
            parts[part][start:stop] = joined[position : position + stop - start]
            position += stop - start
        return parts


def _one_after_another(rows: Sequence[int], size: Mapping[str, int]) -> Iterator[Piece]:
    return (Piece(part, 0, count) for part, count in enumerate(rows))


def _by_group(rows: Sequence[int], size: Mapping[str, int]) -> Iterator[Piece]:
    for group in range(size["groups"]):
        for part, count in enumerate(rows):
            each = count // size["groups"]
            yield Piece(part, group * each, (group + 1) * each)


def _by_head(rows: Sequence[int], size: Mapping[str, int]) -> Iterator[Piece]:
    (all_rows,) = rows
    dim = all_rows // (3 * size["vision_heads"])
    for head in range(size["vision_heads"]):
        for matrix in range(3):
            start = (matrix * size["vision_heads"] + head) * dim
            yield Piece(0, start, start + dim)


COPY = Transform(_one_after_another)
QKV = Transform(_by_group)
GATE_UP = Transform(_one_after_another, stacked=2)
FUSED_UP = Transform(_one_after_another, stacked=2)
VISION_QKV = Transform(_by_head)
