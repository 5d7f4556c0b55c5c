"""The keys of a configuration: names, defaults and meanings, read from the dataclasses themselves.

@dataclass
class CheckpointConfig:
    keep_last: int = 0  # checkpoints to keep; 0: all     ->  Key("checkpoint.keep_last", int, 0, "checkpoints to ...")

The comment on a field's line is its documentation: `--help` and docs/training.md print it. A comment that is too long
for the line stands on the lines above the field.
"""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, NamedTuple, get_args, get_type_hints

from typer.core import TyperCommand

from common.nearest import nearest

SHOWN = 3  # suggestions for one unknown key


class Key(NamedTuple):
    """One key, or a section of keys."""

    name: str  # dotted; the keys of a list's items have the list's name and []: data.sources[].weight
    kind: Any  # type of its value; a dataclass for a section
    default: Any
    owner: type  # the dataclass whose field it is

    @property
    def meaning(self) -> str:
        """The comment of its field; empty if it has none."""
        return field_comments(self.owner).get(self.leaf, "")

    @property
    def is_section(self) -> bool:
        """Whether it stands for keys, and has no value of its own."""
        return is_dataclass(self.kind)

    @property
    def section(self) -> str:
        """The name without its last part; empty at the top."""
        return self.name.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]


def flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested sections by dotted key. Lists are leaves."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def keys_of(schema: type) -> list[Key]:
    """Return every key and section of a schema (a dataclass whose fields all have defaults), in its order."""
    return list(_walk(schema(), ""))


def _walk(values: Any, prefix: str) -> Iterator[Key]:
    hints = get_type_hints(type(values))
    for field in fields(values):
        name, kind, default = prefix + field.name, hints[field.name], getattr(values, field.name)
        yield Key(name, kind, default, type(values))
        if is_dataclass(kind):
            yield from _walk(default, f"{name}.")
        for item in get_args(kind):
            if is_dataclass(item):
                yield from _walk(item(), f"{name}[].")  # type: ignore[operator]


@cache
def field_comments(schema: type) -> dict[str, str]:
    """Return the comments of a dataclass's fields, by name; those of its base classes too."""
    comments: dict[str, str] = {}
    for cls in reversed(schema.__mro__):
        if is_dataclass(cls):
            comments |= _own_comments(textwrap.dedent(inspect.getsource(cls)))
    return comments


def _own_comments(source: str) -> dict[str, str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    by_line = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    lines = source.splitlines()
    [definition] = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    comments = {}
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            assert node.end_lineno is not None
            found = [by_line[line] for line in range(node.lineno, node.end_lineno + 1) if line in by_line]
            above = node.lineno - 1
            while not found and lines[above - 1].lstrip().startswith("#"):
                above -= 1
            found = found or [by_line[line] for line in range(above + 1, node.lineno)]
            if found:
                comments[node.target.id] = " ".join(found)
    return comments


# --- unknown keys -----------------------------------------------------------------------------------------------------


def unknown_key(name: str, known: Sequence[Key]) -> str:
    """Return what to say about a key that does not exist: the keys that were probably meant, and those of its section.

    >>> unknown_key("train.lr", keys)
    "unknown key 'train.lr': did you mean optimizer.lr? The keys of train are steps, global_batch_size, ..."
    """
    message = f"unknown key {name!r}"
    if probable := probable_keys(name, known):
        message += f": did you mean {' or '.join(probable[:SHOWN])}?"
    section = name.rpartition(".")[0]
    if leaves := [key.leaf for key in known if section and key.section == section]:
        message += f"{'' if probable else ':'} The keys of {section} are {', '.join(leaves)}"
    return message


def probable_keys(name: str, known: Sequence[Key]) -> list[str]:
    """Return the keys that an unknown name probably means; none if none is near.

    checkpoint.interval -> checkpoint.save_interval                          all its words, in its own section
    train.lr            -> optimizer.lr                                      the same leaf elsewhere
    data.batch_size     -> train.global_batch_size, train.micro_batch_size   all its words
    train.stepz         -> train.steps                                       similar spelling
    """
    section, _, leaf = name.rpartition(".")
    own = [key for key in known if key.section == section]
    others = [key for key in known if "[]" not in key.name]
    words = set(leaf.split("_"))
    if in_section := [key.name for key in own if words <= set(key.leaf.split("_"))]:
        return in_section
    if same := [key.name for key in others if key.leaf == leaf]:
        return same
    for keys in (own, others):
        if with_words := [key.name for key in keys if words <= set(key.leaf.split("_"))]:
            return with_words
        if near := nearest(leaf, (key.leaf for key in keys)):
            return [key.name for key in keys if key.leaf == near]
    return []


# --- tables -----------------------------------------------------------------------------------------------------------


def shown_value(value: Any) -> str:
    """Return a value as YAML writes it; an empty string stays empty."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def help_command(schema: type) -> type[TyperCommand]:
    """Return a command class whose --help ends with the table of all keys of `schema`."""

    class CommandWithKeys(TyperCommand):
        def format_epilog(self, ctx: Any, formatter: Any) -> None:
            keys = [key for key in keys_of(schema) if not key.is_section]
            rows = [(f"{key.name}={shown_value(key.default)}", key.meaning) for key in keys]
            with formatter.section("Keys, their defaults and meanings"):
                formatter.write_dl(rows, col_max=24)

    return CommandWithKeys
