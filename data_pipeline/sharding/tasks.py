"""What a build consists of: its tasks, and a description by which a later start knows whether it is the same build.

Tasks are runs of units of about equal size. They depend on the input and the options alone, never on the number of
workers, so that any number of processes and machines may share them and every byte comes out the same.

    sizes of units  4 4 4 4 | 4 4 4 4 | 4 4 4          three tasks of shard_bytes=16 and what is left
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from data_pipeline.domains.chat import CHAT_FORMS, DEFAULT_FORM
from data_pipeline.errors import DataError
from data_pipeline.inputs.draft import MATERIAL, Input, Unit
from data_pipeline.inputs.names import files_below, shown_names

FORMAT = "glmv-shards-1"
MIN_TASK_BYTES = 16 << 20
SMALL_BUILD_TASKS = 16  # what is too small for so many shards of the size asked for is cut into smaller ones
_HASHED_WHOLE = 1 << 30  # bytes of all input files together; of more, a part of each file is looked at
_SAMPLES, _SAMPLE_BYTES = 16, 64 << 10


@dataclass(frozen=True)
class BuildOptions:
    """What decides the shards beside the input. tokenizer: its folder; name: shards are called NAME-TTTTT-SSSSS.tar;
    shard_bytes: a shard with so many is full; chat_form: how chats are written."""

    out: str
    tokenizer: str = ""
    name: str = "shard"
    shard_bytes: int = 1 << 30
    chat_form: str = DEFAULT_FORM

    def __post_init__(self) -> None:
        if self.shard_bytes < 1:
            raise DataError(f"--shard-bytes {self.shard_bytes}: give a positive number, e.g. 1G")
        if not self.name or self.name.startswith(".") or set(self.name) & set('/\\*?[]"'):
            raise DataError(f"--name {self.name!r}: shards are files called so; use letters, digits, - and _")
        if self.chat_form not in CHAT_FORMS:
            raise DataError(f"--chat-form {self.chat_form} is unknown: use {' or '.join(CHAT_FORMS)}")


@dataclass(frozen=True)
class Task:
    """A run of units, as (number of the input, unit), written by one process. bytes: roughly what it will write."""

    number: int
    pieces: tuple[tuple[int, Unit], ...]
    bytes: int


def cut_tasks(units: Sequence[tuple[int, Unit]], shard_bytes: int) -> list[Task]:
    """Tasks of about one shard each, all of about the same size. A unit is never cut."""
    total = sum(unit.bytes for _, unit in units)
    target = min(shard_bytes, max(total // SMALL_BUILD_TASKS, MIN_TASK_BYTES))
    count = max(1, -(-total // target))
    runs: dict[int, list[tuple[int, Unit]]] = {}
    before = 0
    for piece in units:
        middle = before + piece[1].bytes / 2
        runs.setdefault(min(count - 1, int(middle * count / max(total, 1))), []).append(piece)
        before += piece[1].bytes
    return [Task(number, tuple(run), sum(unit.bytes for _, unit in run)) for number, run in enumerate(runs.values())]


@dataclass(frozen=True)
class Plan:
    """inputs: (kind, input). description: JSON, all that decides the shards; it opens the manifest."""

    options: BuildOptions
    inputs: list[tuple[str, Input]] = field(repr=False)
    tasks: list[Task] = field(repr=False)
    description: dict[str, Any] = field(repr=False)

    @property
    def bytes(self) -> int:
        return sum(task.bytes for task in self.tasks)


def plan_build(inputs: Sequence[tuple[str, Input]], options: BuildOptions, tokenizer_hash: str) -> Plan:
    """Lists the units, cuts them into tasks and looks at the input files. Raises DataError."""
    units = [(number, unit) for number, (_, given) in enumerate(inputs) for unit in given.units()]
    tasks = cut_tasks(units, options.shard_bytes)
    sizes = {unit.path: _size(unit.path) for _, unit in units}
    whole = sum(sizes.values()) <= _HASHED_WHOLE
    described = []
    for number, (kind, given) in enumerate(inputs):
        own = [unit for place, unit in units if place == number]
        shown = shown_names(tuple(dict.fromkeys(unit.path for unit in own)))
        described.append(
            {
                "kind": kind,
                "options": {
                    option.name: getattr(given, option.name) for option in fields(given) if option.name != "paths"
                },
                "files": [
                    {"path": name, "bytes": sizes[path], "sha256": _content(path, whole)}
                    for path, name in shown.items()
                ],
                "material": {
                    option.name: _folder_content(getattr(given, option.name))
                    for option in fields(given)
                    if option.metadata == MATERIAL and getattr(given, option.name)
                },
                "units": len(own),
                "units_sha256": _hash_of([{**asdict(unit), "path": shown[unit.path]} for unit in own]),
            }
        )
    description = {
        "format": FORMAT,
        "version": _package_version(),
        "name": options.name,
        "shard_bytes": options.shard_bytes,
        "chat_form": options.chat_form,
        "tokenizer": tokenizer_hash,
        "tasks": len(tasks),
        "inputs": json.loads(json.dumps(described, default=str)),
    }
    return Plan(options, list(inputs), tasks, description)


def check_same(begun: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    """Raises DataError naming what differs between the build that `out` holds and this one."""
    changes = list(_differences({key: begun.get(key) for key in now}, now))
    if changes:
        raise DataError(
            f"{out} holds a build of something else: {'; '.join(changes[:3])}. Give another --out, or remove {out}"
        )


def _differences(old: Any, new: Any, place: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        name = f"{place}{new['path']} " if "path" in new else place
        for key in new:
            yield from _differences(old.get(key), new[key], f"{name}{key} ")
    elif isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            yield f"{place}were {len(old)} and are {len(new)}"
        else:
            for before, after in zip(old, new, strict=True):
                yield from _differences(before, after, place)
    elif old != new:
        yield f"{place}was {old!r} and is {new!r}"


def _size(path: str) -> int:
    return os.path.getsize(path) if os.path.isfile(path) else 0


def _content(path: str, whole: bool) -> str:
    """Hash of a file, or of evenly spaced parts of it; of a folder nothing, its units name its files and sizes."""
    if not os.path.isfile(path):
        return ""
    with open(path, "rb") as file:
        if whole:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        last = max(0, os.path.getsize(path) - _SAMPLE_BYTES)
        for number in range(_SAMPLES):
            file.seek(last * number // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()


def _folder_content(folder: str) -> str:
    """Hash of all files in a folder, with their names."""
    files = {path.relative_to(folder).as_posix(): str(path) for path in files_below(Path(folder))}
    whole = sum(map(_size, files.values())) <= _HASHED_WHOLE
    return _hash_of({name: [_size(path), _content(path, whole)] for name, path in files.items()})


def _hash_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _package_version() -> str:
    try:
        return version("glmv-train")
    except PackageNotFoundError:  # a clone that was not installed
        return "uninstalled"
