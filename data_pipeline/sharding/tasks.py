"""What a build consists of: its tasks, and a description that tells a later start whether it is the same build.

A task is a run of units of about equal size. Tasks depend on the input and the options alone, never on the number of
workers. So any number of processes and machines may share them, and every byte comes out the same.

    sizes of units  4 4 4 4 | 4 4 4 4 | 4 4 4          three tasks of shard_bytes=16; the last one is smaller
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from data_pipeline.domains.chat import CHAT_FORMS
from data_pipeline.domains.rl_record import RlRecord
from data_pipeline.errors import DataError
from data_pipeline.inputs.draft import MATERIAL, Input, Unit
from data_pipeline.inputs.kinds import open_inputs
from data_pipeline.inputs.names import files_below, shown_names

FORMAT = "glmv-shards-1"
MANIFEST = "manifest.json"
MIN_TASK_BYTES = 16 << 20
SMALL_BUILD_TASKS = 16  # a build too small for this many shards of the requested size gets smaller shards
_HASHED_WHOLE = 1 << 30  # input bytes that are hashed completely; of larger inputs, samples of each file are hashed
_SAMPLES, _SAMPLE_BYTES = 16, 64 << 10

# Raises BadSample for a prompt whose verifier does not exist, or cannot read its reference. A function at the top of a
# module, because it is sent to other processes. Commands hand it in: this package knows no verifiers.
PromptCheck = Callable[[RlRecord], None]


@dataclass(frozen=True)
class BuildOptions:
    """What decides the shards, beside the input."""

    out: str  # folder of the shards
    tokenizer: str = ""  # Hugging Face tokenizer folder; empty: text tokens are not counted
    name: str = "shard"  # shards are called NAME-TTTTT-SSSSS.tar
    shard_bytes: int = 1 << 30  # a shard of this size is full
    chat_form: str = ""  # how chats are written; empty: as the models of the tokenizer write them
    check_prompt: PromptCheck | None = None  # checks samples of the domain `rl`; None: their verifiers are not checked

    def __post_init__(self) -> None:
        if self.shard_bytes < 1:
            raise DataError(f"--shard-bytes {self.shard_bytes}: give a positive size, e.g. 1GiB")
        if not self.name or self.name.startswith(".") or set(self.name) & set('/\\*?[]"'):
            raise DataError(f"--name {self.name!r} becomes part of file names: use letters, digits, - and _")
        check_chat_form(self.chat_form)


def check_chat_form(chat_form: str) -> None:
    """Check that chats can be written in a form; empty: in that of the tokenizer. Raises DataError."""
    if chat_form and chat_form not in CHAT_FORMS:
        raise DataError(f"--chat-form {chat_form} is unknown: use {' or '.join(CHAT_FORMS)}")


@dataclass(frozen=True)
class Task:
    """A run of units that one process writes."""

    number: int  # from 0
    units: tuple[tuple[int, Unit], ...]  # (number of the input, unit)
    bytes: int  # estimated bytes of its shards


def cut_tasks(units: Sequence[tuple[int, Unit]], shard_bytes: int) -> list[Task]:
    """Cut units into tasks of about one shard each, all of about the same size. A unit is never split."""
    total = sum(unit.bytes for _, unit in units)
    target = min(shard_bytes, max(total // SMALL_BUILD_TASKS, MIN_TASK_BYTES))
    count = max(1, -(-total // target))
    runs: dict[int, list[tuple[int, Unit]]] = {}
    before = 0
    for numbered in units:
        middle = before + numbered[1].bytes / 2
        runs.setdefault(min(count - 1, int(middle * count / max(total, 1))), []).append(numbered)
        before += numbered[1].bytes
    return [Task(number, tuple(run), sum(unit.bytes for _, unit in run)) for number, run in enumerate(runs.values())]


@dataclass(frozen=True)
class BuildPlan:
    """A build that has been checked and cut into tasks."""

    options: BuildOptions
    inputs: list[tuple[str, Input]] = field(repr=False)  # (kind, input)
    tasks: list[Task] = field(repr=False)
    skipped: Counter[str] = field(repr=False)  # files that are not read, by name
    description: dict[str, Any] = field(repr=False)  # JSON: all that decides the shards; the manifest begins with it

    @property
    def bytes(self) -> int:
        """Return the estimated bytes of all shards."""
        return sum(task.bytes for task in self.tasks)


def open_apart(paths: Sequence[str], out: str, kind: str = "", settings: Sequence[str] = ()) -> list[tuple[str, Input]]:
    """Open inputs for a build into `out`.

    Raises:
        DataError: `out` lies in an input, where it would be read as input; or an input cannot be opened.
    """
    for path in paths:
        if Path(out).resolve().is_relative_to(Path(path).resolve()):
            raise DataError(f"--out {out} lies in the input {path}: choose a folder beside it")
    return open_inputs(paths, kind, settings)


def plan_build(
    inputs: Sequence[tuple[str, Input]], options: BuildOptions, tokenizer_hash: str, skipped: Mapping[str, int]
) -> BuildPlan:
    """List the units, cut them into tasks, and hash the input files.

    Raises:
        DataError: an input cannot be listed or read.
    """
    units = [(number, unit) for number, (_, given) in enumerate(inputs) for unit in given.units()]
    tasks = cut_tasks(units, options.shard_bytes)
    sizes = {unit.path: _size(unit.path) for _, unit in units}
    described = [
        _describe(kind, given, [unit for owner, unit in units if owner == number], sizes)
        for number, (kind, given) in enumerate(inputs)
    ]
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
    return BuildPlan(options, list(inputs), tasks, Counter(skipped), description)


def _describe(kind: str, given: Input, units: Sequence[Unit], sizes: dict[str, int]) -> dict[str, Any]:
    """Describe one input: its options, and the size and hash of everything that it reads."""
    options = [option for option in fields(given) if option.name != "paths"]
    shown = shown_names(tuple(dict.fromkeys(unit.path for unit in units)))
    whole = sum(sizes.values()) <= _HASHED_WHOLE
    return {
        "kind": kind,
        "options": {option.name: getattr(given, option.name) for option in options},
        "files": [
            {"path": name, "bytes": sizes[path], "sha256": _content(path, whole)} for path, name in shown.items()
        ],
        "material": {
            option.name: _folder_content(getattr(given, option.name))
            for option in options
            if option.metadata == MATERIAL and getattr(given, option.name)
        },
        "units": len(units),
        "units_sha256": _hash_of([{**asdict(unit), "path": shown[unit.path]} for unit in units]),
    }


def check_same(begun: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    """Check that the build in `out` is the build that is asked for.

    Raises:
        DataError: they differ; the message says in what.
    """
    changes = list(_differences({key: begun.get(key) for key in now}, now))
    if changes:
        raise DataError(
            f"{out} holds another build: {'; '.join(changes[:3])}. Give another --out, or remove the folder {out}"
        )


def _differences(old: Any, new: Any, where: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        name = f"{where}{new['path']} " if "path" in new else where
        for key in new:
            yield from _differences(old.get(key), new[key], f"{name}{key} ")
    elif isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            yield f"{where}were {len(old)} and are {len(new)}"
        else:
            for before, after in zip(old, new, strict=True):
                yield from _differences(before, after, where)
    elif old != new:
        yield f"{where}was {old!r} and is {new!r}"


def _size(path: str) -> int:
    return os.path.getsize(path) if os.path.isfile(path) else 0


def _content(path: str, whole: bool) -> str:
    """Return the hash of a file, or of evenly spaced samples of it. Empty for a folder: its units list its files."""
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
    """Return the hash of all files in a folder and of their names."""
    files = {path.relative_to(folder).as_posix(): str(path) for path in files_below(Path(folder))}
    whole = sum(map(_size, files.values())) <= _HASHED_WHOLE
    return _hash_of({name: [_size(path), _content(path, whole)] for name, path in files.items()})


def _hash_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _package_version() -> str:
    try:
        return version("glmv-train")
    except PackageNotFoundError:  # a clone that is not installed
        return "uninstalled"
