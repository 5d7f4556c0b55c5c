"""Where weights come from: tensors by their Hugging Face names, of which any rows can be read."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from model.errors import WeightsError


class WeightSource(Protocol):
    """A source of tensors by their Hugging Face names. Nothing is read before it is asked for."""

    def names(self) -> list[str]:
        """Return the names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which `rows` gives a tensor."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return the indices [start, stop) of a tensor's first dimension. Raises WeightsError for bad values."""

    def where(self, name: str) -> str:
        """Return where a tensor comes from, such as its file, for messages."""


def whole(source: WeightSource, name: str) -> Tensor:
    """Return one tensor with all its rows."""
    return source.rows(name, 0, source.shape(name)[0])


def rows_of(block_bytes: int, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return how many rows of a tensor fit into `block_bytes`, at least one."""
    return max(1, block_bytes // max(1, prod(shape[1:]) * dtype.itemsize))


def check_names_and_shapes(source: WeightSource, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check that `source` holds exactly the tensors of `expected`, without reading their values.

    Raises:
        WeightsError: names are missing or unknown, or shapes differ.
    """
    names = set(source.names())
    problems = []
    if missing := [name for name in expected if name not in names]:
        problems.append(f"missing: {some(missing)}")
    if unknown := sorted(names - set(expected)):
        problems.append(f"unknown: {some(unknown)}")
    if wrong := [
        f"{name} is {list(source.shape(name))}, not {list(shape)}"
        for name, shape in expected.items()
        if name in names and source.shape(name) != shape
    ]:
        problems.append(f"of another shape: {some(wrong)}")
    if problems:
        raise WeightsError("the weights do not fit the model's config.json; tensors " + "; ".join(problems))


def some(names: list[str], limit: int = 8) -> str:
    """Return the first few of a list of names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
