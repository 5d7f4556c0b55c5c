"""Show what is in a checkpoint or a Hugging Face folder: as text, or as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tools.inspection import CHECKPOINT_FORMAT, OPTIMIZER, Inspected, Stored, by_part, dtypes
from tools.inspection_tree import Folded, folded, tree_of

INDENT = "  "


def show(found: Inspected, console: Console, *, list_tensors: bool) -> None:
    """Print a folder: what it is, its parts, the tree of tensors, files, checksums and problems."""
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_row(found.kind, escape(str(found.path)))
    for name, value in {"format": found.format, **found.facts}.items():
        facts.add_row(name, escape(str(value)))
    for name, value in (found.checksums or {"files": "none"}).items():
        facts.add_row(f"checksums of {name}", escape(str(value)))
    console.print(facts)
    console.print()
    console.print(_parts(found.tensors))
    console.print()
    console.print(_tensors(found.tensors) if list_tensors else _tree(found.tensors))
    if list_tensors and found.format == CHECKPOINT_FORMAT and found.tensor_checksums:
        table = _table("checksum of", "is")
        for name, checksum in found.tensor_checksums.items():
            table.add_row(escape(name), escape(checksum))
        console.print()
        console.print(table)
    console.print()
    console.print(_files(found))
    for problem in found.problems:
        console.print(f"problem: {problem}", markup=False, soft_wrap=True)


def _table(*titles: str, right: Sequence[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in titles:
        table.add_column(title, justify="right" if title in right else "left", overflow="fold")
    return table


def _parts(tensors: Sequence[Stored]) -> Table:
    table = _table("part", "tensors", "values", "bytes", "dtypes", right=("tensors", "values", "bytes"))
    for name, members in [*by_part(tensors).items(), ("all", list(tensors))]:
        values, nbytes = sum(each.values for each in members), sum(each.nbytes for each in members)
        table.add_row(name, f"{len(members):,}", f"{values:,}", size(nbytes), ", ".join(dtypes(members)))
    return table


def _tree(tensors: Sequence[Stored]) -> Table:
    table = _table("tensors", "shape", "values", "bytes", "dtypes", right=("values", "bytes"))
    for depth, child in _rows(folded(tree_of(tensors))):
        times = f" ({child.times} times)" if child.times > 1 else ""
        shape = str(list(child.node.tensor.shape)) if child.node.tensor is not None else ""
        kinds = ", ".join(dtypes(child.node.tensors()))
        table.add_row(
            escape(INDENT * depth + child.name + times), escape(shape), f"{child.values:,}", size(child.nbytes), kinds
        )
    return table


def _rows(children: Sequence[Folded], depth: int = 0) -> Iterator[tuple[int, Folded]]:
    """Yield the tree from top to bottom, with depths. The optimizer's tensors are those of the model again."""
    for child in children:
        yield depth, child
        if depth == 0 and child.name.startswith(OPTIMIZER):
            yield from ((1, kind) for kind in child.children())
        else:
            yield from _rows(child.children(), depth + 1)


def _tensors(tensors: Sequence[Stored]) -> Table:
    table = _table("tensor", "shape", "dtype", "bytes", "in", "checksum", right=("bytes",))
    for each in tensors:
        where = each.files[0] if len(each.files) == 1 else f"{len(each.files)} files"
        where += f", {each.chunks} chunks" if each.chunks > 1 else ""
        table.add_row(
            *map(escape, (each.name, str(list(each.shape)), each.dtype, size(each.nbytes), where, each.checksum))
        )
    return table


def _files(found: Inspected) -> Table:
    table = _table("file", "bytes", "chunks of tensors", right=("bytes", "chunks of tensors"))
    for name, nbytes in found.files.items():
        held = found.chunks.get(name)
        table.add_row(escape(name), f"{nbytes:,}", f"{held:,}" if held else "")
    table.add_row("all", f"{sum(found.files.values()):,}", f"{sum(found.chunks.values()):,}")
    return table


def size(nbytes: int) -> str:
    """Return bytes as people read them, in powers of 10.

    >>> size(740), size(2_345_678)
    ('740 B', '2.35 MB')
    """
    power, amount = 0, float(nbytes)
    while amount >= 1000:
        power, amount = power + 1, amount / 1000
    return f"{amount:.3g} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}"


# --- JSON -------------------------------------------------------------------------------------------------------------


def as_json(found: Inspected, *, list_tensors: bool) -> dict[str, Any]:
    """Return the same for machines."""
    content: dict[str, Any] = {
        "path": str(found.path),
        "kind": found.kind,
        "format": found.format,
        **found.facts,
        "parts": {name: _sum(members) for name, members in by_part(found.tensors).items()},
        "all": _sum(found.tensors),
        "tree": [_json_node(child) for child in folded(tree_of(found.tensors))],
        "files": {name: {"bytes": nbytes, "chunks": found.chunks.get(name, 0)} for name, nbytes in found.files.items()},
        "checksums": found.checksums,
        "problems": found.problems,
    }
    if list_tensors:
        content["tensor_checksums"] = found.tensor_checksums
        content["tensors"] = {each.name: _json_tensor(each) for each in found.tensors}
    return content


def _sum(tensors: Sequence[Stored]) -> dict[str, Any]:
    values, nbytes = sum(each.values for each in tensors), sum(each.nbytes for each in tensors)
    return {"tensors": len(tensors), "values": values, "bytes": nbytes, "dtypes": list(dtypes(tensors))}


def _json_node(child: Folded) -> dict[str, Any]:
    content: dict[str, Any] = {"name": child.name, "times": child.times, "values": child.values, "bytes": child.nbytes}
    if child.node.tensor is not None:
        return {**content, "shape": list(child.node.tensor.shape), "dtype": child.node.tensor.dtype}
    return {**content, "children": [_json_node(each) for each in child.children()]}


def _json_tensor(each: Stored) -> dict[str, Any]:
    content = {"shape": list(each.shape), "dtype": each.dtype, "bytes": each.nbytes, "files": list(each.files)}
    return {**content, "chunks": each.chunks, "checksum": each.checksum}
