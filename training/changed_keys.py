"""What may change when a run resumes: keys that decide the model or the data plan may not; others are named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.urls import shown
from data_pipeline.config import SourceConfig
from model.config import ConfigError
from training.config import RunConfig
from training.keys import flatten

# Keys that decide the model or the data plan. Every other key may change when a run resumes.
FIXED = (
    "model.preset",
    "model.init_from",
    "model.init_optimizer",
    "model.max_position_embeddings",
    "model.rope_theta",
    "lora.alpha",
    "train.global_batch_size",
    "train.seq_length",
    "data.sources",
    "data.seed",
    "data.tokenizer",
    "data.image_max_tokens",
    "data.video_max_tokens",
    "data.segment_multiple",
)
# Keys that may change without a word: how a run is started, and where its folder is.
UNTOLD = frozenset(("train.output_dir", "checkpoint.allow_changes", "checkpoint.resume"))


def with_defaults(before: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """Return the keys of a checkpoint's configuration; a key that did not exist when it was written has its default."""
    return {**dict(flatten(asdict(type(config)()))), **dict(flatten(before))}


def accept_moved_paths(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """Replace the old paths of sources and tokenizer by the new ones, and yield a line about each.

    A path decides nothing: the loader compares the content, by the sources' names and fingerprints and by the
    tokenizer's hash, when it takes up the checkpoint's counters.
    """
    if old["data.tokenizer"] != new["data.tokenizer"]:
        yield f"data.tokenizer has moved from {old['data.tokenizer']} to {new['data.tokenizer']}: the same tokens"
        old["data.tokenizer"] = new["data.tokenizer"]
    if old["data.root"] != new["data.root"]:
        yield f"data.root has moved from {shown(old['data.root'])!r} to {shown(new['data.root'])!r}: the same samples"
        old["data.root"] = new["data.root"]
    if new["lora.rank"] and old["model.init_from"] != new["model.init_from"]:  # check_same_base compared the content
        yield f"model.init_from has moved from {old['model.init_from']} to {new['model.init_from']}: the same weights"
        old["model.init_from"] = new["model.init_from"]
    if len(old["data.sources"]) != len(new["data.sources"]):
        return
    sources = []
    for before, now in zip(old["data.sources"], new["data.sources"], strict=True):
        label = SourceConfig(**now).label()
        if before["path"] != now["path"] and SourceConfig(**before).label() == label:
            yield f"source {label!r} has moved from {shown(before['path'])} to {shown(now['path'])}: the same samples"
            before = {**before, "path": now["path"], "name": now["name"]}
        sources.append(before)
    old["data.sources"] = sources


def refuse_changes(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    """Refuse another value of a key that decides the model or the data plan.

    Raises:
        ConfigError: a key has changed. It is named, with both values.
    """
    for key in sorted(old.keys() | new.keys()):
        if key.startswith(FIXED) and old.get(key) != new.get(key):
            where, was, is_now = _difference(key, old.get(key), new.get(key))
            raise ConfigError(
                f"{where} was {was!r} in the run at {folder} and is {is_now!r} now; put it back, choose "
                "another train.output_dir, or set checkpoint.allow_changes=true"
            )


def changes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """Yield a line about each key that has another value than in the checkpoint, and so applies from now on."""
    for key in sorted(new.keys() - UNTOLD):
        if old.get(key) != new[key]:
            where, was, is_now = _difference(key, old.get(key), new[key])
            yield f"{where} was {_shown_value(was)} in the checkpoint and is {_shown_value(is_now)} now"


def _shown_value(value: Any) -> str:
    """Return a value for a message, the paths in it without signatures."""
    if isinstance(value, str):
        return repr(shown(value))
    if isinstance(value, list):
        return f"[{', '.join(map(_shown_value, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {_shown_value(each)}' for name, each in value.items())}}}"
    return str(value)


def refuse_another_freeze(before: dict[str, Any], freeze: list[str], folder: Path) -> None:
    """Refuse other frozen parts than those of the checkpoint.

    Raises:
        ConfigError: they are others.
    """
    frozen = before.get("freeze", [])
    if set(frozen) != set(freeze):
        raise ConfigError(
            f"freeze was {frozen} in the run at {folder} and is {freeze} now, but the checkpoint has no optimizer "
            "state of frozen parts; put it back, or begin another run from this one's weights: "
            f"model.init_from={folder}, and another train.output_dir"
        )


def _difference(key: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    """Return where two lists or mappings of the same shape first differ, such as data.sources[2].weight."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(f"{key}[{index}]", *pair) for index, pair in enumerate(zip(old, new, strict=True))]
    elif isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        pairs = [(f"{key}.{name}", old[name], new[name]) for name in old]
    else:
        return key, old, new
    return _difference(*next(pair for pair in pairs if pair[1] != pair[2]))
