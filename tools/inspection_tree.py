"""The tree of a model's tensors, in which equal layers and experts that follow one another are one node."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from tools.inspection import Stored


@dataclass
class Node:
    """A module, or a tensor if `tensor` is given."""

    tensor: Stored | None = None
    children: dict[str, Node] = field(default_factory=dict)

    def tensors(self) -> Iterator[Stored]:
        """Yield all tensors under this node."""
        if self.tensor is not None:
            yield self.tensor
        for child in self.children.values():
            yield from child.tensors()

    def form(self) -> tuple[Any, ...]:
        """Return what two nodes have in common that are shown as one: names, dtypes and shapes."""
        own = (self.tensor.dtype, self.tensor.shape) if self.tensor is not None else ()
        return own, tuple((name, child.form()) for name, child in sorted(self.children.items()))


@dataclass(frozen=True)
class Folded:
    """A node as it is shown: of `times` equal ones, one."""

    name: str
    times: int
    node: Node
    outer: int = 1  # how many equal ones the nodes around it stand for

    @property
    def values(self) -> int:
        """Values in all of the equal nodes."""
        return self.outer * self.times * sum(tensor.values for tensor in self.node.tensors())

    @property
    def nbytes(self) -> int:
        """Bytes in all of the equal nodes."""
        return self.outer * self.times * sum(tensor.nbytes for tensor in self.node.tensors())

    def children(self) -> list[Folded]:
        """Return what is under it."""
        return [replace(child, outer=self.outer * self.times) for child in folded(self.node)]


def tree_of(tensors: Sequence[Stored]) -> Node:
    """Return the tree of tensors, by the dots in their names."""
    root = Node()
    for tensor in tensors:
        node = root
        for name in tensor.name.split("."):
            node = node.children.setdefault(name, Node())
        node.tensor = tensor
    return root


def folded(node: Node) -> list[Folded]:
    """Return the children of a node; numbered ones that are equal and follow one another are one.

    A module with one thing in it is named together with that: `norm.weight`.
    """
    return [_joined(child) for child in _children(node)]


def _joined(child: Folded) -> Folded:
    while child.node.tensor is None and len(inner := _children(child.node)) == 1 and inner[0].times == 1:
        child = Folded(f"{child.name}.{inner[0].name}", child.times, inner[0].node)
    return child


def _children(node: Node) -> list[Folded]:
    numbered = sorted((int(name), child) for name, child in node.children.items() if name.isdigit())
    found = [Folded(name, 1, child) for name, child in node.children.items() if not name.isdigit()]
    runs = groupby(enumerate(numbered), key=lambda each: (each[1][0] - each[0], each[1][1].form()))
    for _, run in runs:
        members = [member for _, member in run]
        (first, child), (last, _) = members[0], members[-1]
        found.append(Folded(f"{first}-{last}" if last > first else str(first), len(members), child))
    return found
