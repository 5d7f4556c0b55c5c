"""Read run folders for the report: metrics, configuration, starts, quarantine. A run may still be writing."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from model.config import ConfigError

Points = tuple[list[float], list[float]]
START = re.compile(r"^([\d-]+ [\d:]+) step (\d+) of (\d+), from (.*), on (\d+) processes$")
LAST_SHARE = 0.02  # of the steps: their mean loss is the run's


@dataclass(frozen=True)
class Start:
    """One start of a run, from its log."""

    time: str
    step: int  # steps that were done
    source: str  # what it started from
    processes: int


@dataclass
class RunRecord:
    """What one run folder says."""

    name: str
    folder: Path
    lines: list[dict[str, Any]]  # of metrics.jsonl
    validation: list[dict[str, Any]]  # of validation.jsonl
    config: dict[str, Any]  # dotted names and values
    starts: list[Start]
    quarantined: Counter[tuple[str, str]]  # by source of the sample (its tar) and reason
    color: str = ""
    x_axis: str = "step"
    _tokens: dict[int, float] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Steps done."""
        return int(self.lines[-1]["step"]) if self.lines else 0

    @property
    def steps_in_all(self) -> int:
        """Length of the run; 0 if it is not known."""
        return int(self.config.get("train.steps", 0))

    def last(self, key: str) -> float | None:
        """Return the newest value of a key."""
        return next((line[key] for line in reversed(self.lines) if _is_number(line.get(key))), None)

    def values(self, key: str) -> list[float]:
        """Return a key's values, in the order of the steps, without those that are not finite."""
        return [line[key] for line in self.lines if _is_number(line.get(key))]

    def last_loss(self) -> float | None:
        """Return the mean loss of the last steps."""
        losses = self.values("loss")
        newest = losses[-max(1, round(len(losses) * LAST_SHARE)) :]
        return sum(newest) / len(newest) if newest else None

    def curve(self, key: str, *, of_validation: bool = False) -> Points:
        """Return the points of a key over the page's x axis."""
        lines = [line for line in (self.validation if of_validation else self.lines) if _is_number(line.get(key))]
        return [self._x(line["step"]) for line in lines], [float(line[key]) for line in lines]

    def names(self, prefix: str, *, of_validation: bool = False) -> list[str]:
        """Return what follows a prefix in the keys of any line, sorted."""
        lines = self.validation if of_validation else self.lines
        return sorted({key.removeprefix(prefix) for line in lines for key in line if key.startswith(prefix)})

    def _x(self, step: int) -> float:
        if self.x_axis == "step":
            return step
        if not self._tokens:
            total = 0.0
            for line in self.lines:
                total = line.get("tokens_total", total + line["tokens"])
                self._tokens[line["step"]] = total
        return self._tokens.get(step, 0.0)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < float("inf")  # nan is not below


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Read runs, and give each a name that tells it from the others.

    Raises:
        ConfigError: a folder is not that of a run, or is named twice.
    """
    resolved = [folder.resolve() for folder in folders]
    if twice := [folder for folder, count in Counter(resolved).items() if count > 1]:
        raise ConfigError(f"{twice[0]} is named twice: name each run once")
    names = _short_names(resolved)
    return [_read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def _short_names(folders: Sequence[Path]) -> list[str]:
    """Return the last parts of the paths, as many as tell them apart."""
    parts = 1
    while True:
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
        parts += 1


def _read_run(folder: Path, name: str) -> RunRecord:
    if not (folder / "metrics.jsonl").is_file():
        what = "is no folder" if not folder.is_dir() else "has no metrics.jsonl"
        raise ConfigError(f"{folder} {what}: give the folder of a run (train.output_dir)")
    return RunRecord(
        name=name,
        folder=folder,
        lines=list(_json_lines(folder / "metrics.jsonl")),
        validation=list(_json_lines(folder / "validation.jsonl")),
        config=_read_config(folder / "config.yaml"),
        starts=list(_starts(folder / "log.txt")),
        quarantined=Counter(_quarantined(folder / "quarantine.jsonl")),
    )


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON Lines file; an incomplete line is one that is still being written."""
    if not path.is_file():
        return
    for line in path.read_text(errors="replace").splitlines():
        try:
            content = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(content, dict) and "step" in content:
            yield content


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(_flat(yaml.safe_load(path.read_text()), ""))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {str(error).splitlines()[0]}") from None


def _flat(content: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield dotted names and values; a list of sources by their names."""
    items: Iterator[tuple[str, Any]]
    if isinstance(content, dict):
        items = iter(content.items())
    elif isinstance(content, list) and content and all(isinstance(item, dict) for item in content):
        items = ((str(item.get("name") or item.get("path") or n), item) for n, item in enumerate(content))
    else:
        yield prefix, content
        return
    for key, value in items:
        yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))


def _starts(path: Path) -> Iterator[Start]:
    if path.is_file():
        for line in path.read_text(errors="replace").splitlines():
            if found := START.match(line):
                yield Start(found[1], int(found[2]), found[4], int(found[5]))


def _quarantined(path: Path) -> Iterator[tuple[str, str]]:
    for record in _json_lines(path):
        yield Path(str(record.get("shard") or "?")).name, str(record.get("reason", "?"))


def different_keys(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Return the keys whose values differ between runs, with the value of each run; "" where a run has no such key."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    rows = [(name, [_shown(run.config, name) for run in runs]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1 and name != "train.output_dir"]


def _shown(config: Mapping[str, Any], name: str) -> str:
    value = config.get(name, "")
    return str(value).lower() if isinstance(value, bool) else str(value)
