"""What is in a checkpoint or a Hugging Face folder: tensors, files, step, layout and checksums, from headers alone.

No tensor is read, and nothing is unpickled except as model.checkpoint_metadata does. What looks wrong (a missing file,
another size than in the manifest, an index that does not fit) is listed in `problems`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from model.checkpoint_metadata import read_metadata
from model.errors import CheckpointError
from model.parts import part_of
from model.weights.files import INDEX, SINGLE, LocalFile, read_bytes
from model.weights.header import HeaderError, read_header

STATE, HF_FILES, TRAIN_STATE, MANIFEST = "state", "hf", "train_state.json", "manifest.json"
CHECKSUM_FILES = (MANIFEST, "checksums.json")  # of a checkpoint, and of an export
CHECKPOINT_FORMAT = "torch_dist"
OPTIMIZER, LORA = "optimizer", "lora"
WRITER = re.compile(r"__(\d+)_\d+\.distcp")


class InspectError(ValueError):
    """The folder cannot be inspected. The message says why."""


@dataclass(frozen=True)
class Stored:
    """A tensor in files."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    files: tuple[str, ...]
    chunks: int = 1  # of a checkpoint: the pieces in which it is stored
    checksum: str = ""  # as `xxh3_64:...`, if the folder has one for each tensor

    @property
    def values(self) -> int:
        """Return how many values it has."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Return the bytes of its values."""
        return self.values * _item_bytes(self.dtype)

    @property
    def part(self) -> str:
        """Return the part of the model that it belongs to, or `optimizer`."""
        path = self.name.split(".")
        if path[0] in (OPTIMIZER, LORA):
            return path[0]
        if path[:2] == ["model", "visual"]:
            return "adapter" if path[2] == "merger" else "vision"
        if path[0] in ("model", "lm_head"):
            return "router" if path[-3:-1] == ["mlp", "gate"] or path[-1] == "e_score_correction_bias" else "decoder"
        try:
            return part_of(self.name)
        except StopIteration:
            return "other"


@dataclass
class Inspected:
    """A folder."""

    path: Path
    kind: str
    format: str
    tensors: list[Stored]
    files: dict[str, int]  # bytes by name, relative to the folder
    chunks: dict[str, int]  # pieces of tensors in files, by name; in safetensors a tensor is one piece
    facts: dict[str, Any] = field(default_factory=dict)
    checksums: dict[str, Any] = field(default_factory=dict)
    tensor_checksums: dict[str, str] = field(default_factory=dict)  # by Hugging Face name
    problems: list[str] = field(default_factory=list)


def inspect_folder(path: Path) -> Inspected:
    """Inspect a step folder, a run's folder (its newest checkpoint) or a Hugging Face folder.

    Raises:
        InspectError: It is none of them.
        CheckpointError: A checkpoint is damaged, or not safe to read.
    """
    if (path / STATE).is_dir():
        return _checkpoint(path)
    if (path / "checkpoints").is_dir():
        return _run(path)
    if (path / INDEX).is_file() or (path / SINGLE).is_file():
        return _hf_folder(path)
    raise InspectError(
        f"{path} is neither a checkpoint ({STATE}/), nor a run's folder (checkpoints/), nor a Hugging Face folder "
        f"({SINGLE} or {INDEX})"
    )


# --- checkpoints ------------------------------------------------------------------------------------------------------


def _run(path: Path) -> Inspected:
    steps = sorted(folder.name for folder in (path / "checkpoints").glob("step_*") if (folder / STATE).is_dir())
    if not steps:
        raise InspectError(f"{path} is a run's folder that has no checkpoint yet")
    latest = path / "checkpoints" / "latest"
    newest = latest.read_text().strip() if latest.is_file() else steps[-1]
    if newest not in steps:
        raise CheckpointError(
            f"{latest} names {newest!r}, which does not exist; inspect one of {', '.join(steps[-3:])}"
        )
    found = _checkpoint(path / "checkpoints" / newest)
    state = _json(path / "state.json")
    run = {"run": f"{len(steps)} checkpoints, {steps[0]} to {steps[-1]}"}
    if state:
        run["run"] += f"; {state.get('state')} at step {state.get('step')} of {state.get('steps')}"
    found.facts = {**run, **found.facts}
    return found


def _checkpoint(path: Path) -> Inspected:
    metadata: Any = read_metadata(path / STATE)
    manifest = _json(path / MANIFEST)
    checksums = _tensor_checksums(path)
    where: dict[str, Counter[str]] = {}
    chunks: Counter[str] = Counter()
    for index, info in metadata.storage_data.items():
        where.setdefault(index.fqn, Counter())[info.relative_path] += 1
        chunks[info.relative_path] += 1
    tensors = []
    problems = []
    for name, stored in metadata.state_dict_metadata.items():
        if not hasattr(stored, "properties"):
            problems.append(f"{name} is a pickled object, which no checkpoint of this program has")
            continue
        held = where.get(name, Counter())
        dtype, shape = str(stored.properties.dtype)[6:], tuple(stored.size)
        tensors.append(Stored(name, dtype, shape, tuple(held), sum(held.values())))
    files = _sizes(path)
    problems += [f"{STATE}/{name} is missing, which holds tensors" for name in chunks if f"{STATE}/{name}" not in files]
    writers = {match[1] for name in chunks if (match := WRITER.fullmatch(name))}
    facts = {"processes": f"{len(writers)} wrote {sum(chunks.values()):,} chunks into {len(chunks)} files"}
    summary, wrong = _file_checksums(manifest, files)
    kind = "checkpoint of a run" if (path / TRAIN_STATE).is_file() else "checkpoint, weights alone"
    return Inspected(
        path=path,
        kind=kind,
        format=CHECKPOINT_FORMAT,
        tensors=tensors,
        files=files,
        chunks={f"{STATE}/{name}": count for name, count in chunks.items()},
        facts={**_train_facts(_json(path / TRAIN_STATE)), **facts, **_config_facts(path / HF_FILES)},
        checksums={**summary, **_summary(checksums)},
        tensor_checksums={name: _checksum(entry) for name, entry in checksums.items()},
        problems=problems + wrong,
    )


def _train_facts(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run's state says of the step and the layout."""
    if not state:
        return {}
    config = state.get("config", {})
    parallel, train = config.get("parallel", {}), config.get("train", {})
    facts = {"step": f"{state['step']:,}" + (f" of {train['steps']:,}" if train.get("steps") else "")}
    if (tokens := state.get("metrics", {}).get("tokens_total")) is not None:
        facts["tokens"] = f"{tokens:,}"
    if parallel:
        sizes = {key.removesuffix("_parallel_size").replace("_model", ""): value for key, value in parallel.items()}
        facts["layout"] = ", ".join(f"{name} {value}" for name, value in sizes.items())
    if state.get("base"):
        facts["adapters"] = f"LoRA, of the base model {state['base']}"
    return facts


# --- Hugging Face folders ---------------------------------------------------------------------------------------------


def _hf_folder(path: Path) -> Inspected:
    problems: list[str] = []
    listed = _index(path, problems)
    names = sorted(set(listed.values())) if listed is not None else [SINGLE]
    checksums = _tensor_checksums(path)
    tensors = []
    for name in names:
        if not (path / name).is_file():
            problems.append(f"{name} is missing, which {INDEX} names")
            continue
        file = LocalFile(path / name)
        try:
            header = read_header(partial(read_bytes, file), file.size)
        except (HeaderError, EOFError) as error:
            problems.append(f"{name} cannot be read as safetensors ({error})")
            continue
        for key, stored in header.items():
            if listed is not None and listed.get(key) != name:
                problems.append(f"{INDEX} does not list {key}, which {name} holds")
            checksum = _checksum(checksums.get(key, {}))
            tensors.append(Stored(key, str(stored.dtype)[6:], stored.shape, (name,), checksum=checksum))
    held = {tensor.name for tensor in tensors}
    lost = [key for key, name in (listed or {}).items() if key not in held and (path / name).is_file()]
    problems += [f"{INDEX} lists {key}, which no file holds" for key in lost]
    described = {name: entry for name, entry in checksums.items() if name in held}
    problems += [
        f"{tensor.name} is {tensor.dtype} {list(tensor.shape)}, and its checksum is of another"
        for tensor in tensors
        if (entry := described.get(tensor.name))
        and (entry.get("dtype"), tuple(entry.get("shape", ()))) != (tensor.dtype, tensor.shape)
    ]
    return Inspected(
        path=path,
        kind="Hugging Face folder",
        format=f"safetensors, {len(names)} {'file' if len(names) == 1 else 'shards'}",
        tensors=tensors,
        files=_sizes(path),
        chunks=Counter(file for tensor in tensors for file in tensor.files),
        facts=_config_facts(path),
        checksums=_summary(checksums),
        tensor_checksums={name: _checksum(entry) for name, entry in checksums.items()},
        problems=problems,
    )


def _index(path: Path, problems: list[str]) -> dict[str, str] | None:
    if not (path / INDEX).is_file():
        return None
    if (path / SINGLE).is_file():
        problems.append(f"{SINGLE} is beside {INDEX}: it may be another model, and is not counted")
    listed = _json(path / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise InspectError(f"{path / INDEX} is not an index of safetensors shards")
    return listed


def _config_facts(folder: Path) -> dict[str, str]:
    """Return what config.json says of the model."""
    config = _json(folder / "config.json")
    text = config.get("text_config") or {}
    vision = config.get("vision_config") or {}
    if not text:
        return {}
    experts = f", {text['n_routed_experts']} experts" if text.get("n_routed_experts") else ""
    return {
        "model": f"{config.get('model_type')}: decoder of {text.get('num_hidden_layers')} layers, "
        f"width {text.get('hidden_size')}{experts}; vision tower of {vision.get('depth')} layers, width "
        f"{vision.get('hidden_size')}"
    }


# --- checksums --------------------------------------------------------------------------------------------------------


def _tensor_checksums(path: Path) -> dict[str, dict[str, Any]]:
    """Return the entries of tensors in the folder's file of checksums, by Hugging Face name."""
    for name in CHECKSUM_FILES:
        entries = _json(path / name).get("tensors")
        if isinstance(entries, dict):
            return entries
    return {}


def _summary(checksums: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    algorithms = sorted({key for entry in checksums.values() for key in entry} - {"dtype", "shape"})
    return {"tensors": f"{len(checksums):,}, {' and '.join(algorithms)}"} if checksums else {}


def _checksum(entry: Mapping[str, Any]) -> str:
    return next((f"{key}:{value}" for key, value in entry.items() if key not in ("dtype", "shape")), "")


def _file_checksums(manifest: Mapping[str, Any], files: Mapping[str, int]) -> tuple[dict[str, Any], list[str]]:
    """Return a summary of a manifest's files, and which of them are missing or of another size."""
    listed = manifest.get("files")
    if not isinstance(listed, dict):
        return {}, []
    problems = []
    for name, entry in listed.items():
        if name not in files:
            problems.append(f"{name} is missing, which {MANIFEST} names")
        elif files[name] != entry["bytes"]:
            problems.append(f"{name} has {files[name]:,} bytes, and {MANIFEST} says {entry['bytes']:,}")
    blocks = sum(len(entry.get("xxh3_64", ())) for entry in listed.values())
    return {"files": f"{len(listed):,}, xxh3_64 of {blocks:,} blocks; only sizes were compared"}, problems


# --- files ------------------------------------------------------------------------------------------------------------


def _sizes(folder: Path) -> dict[str, int]:
    paths: Iterable[Path] = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def _json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if there is none.

    Raises:
        InspectError: It is not JSON.
    """
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InspectError(f"{file} is not valid JSON: {error}") from None
    return content if isinstance(content, dict) else {}


def _item_bytes(dtype: str) -> int:
    """Return the bytes of one value of a torch dtype, from its name."""
    bits = re.search(r"\d+", dtype)
    return max(1, int(bits[0]) // 8) if bits else 1


def by_part(tensors: Iterable[Stored]) -> dict[str, list[Stored]]:
    """Return the tensors of each part, in the order in which parts are found."""
    parts: dict[str, list[Stored]] = {}
    for tensor in tensors:
        parts.setdefault(tensor.part, []).append(tensor)
    return parts


def dtypes(tensors: Iterable[Stored]) -> Iterator[str]:
    """Yield the dtypes of tensors, those of most bytes first."""
    total: Counter[str] = Counter()
    for tensor in tensors:
        total[tensor.dtype] += tensor.nbytes
    yield from (name for name, _ in total.most_common())
