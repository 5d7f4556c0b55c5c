"""Sizes and checksums of the files of a checkpoint, so that a damaged file is named when the checkpoint is loaded.

`manifest.json` lists every file of a step folder except itself:

    {"block_bytes": 1073741824,
     "files": {"state/__0_0.distcp": {"bytes": 1500000000, "xxh3_64": ["91fd3a...", "07c2e9..."]}, ...}}

A file has one checksum per block, so that several processes can share the work on a large file.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
import xxhash

from common.files import write_json
from common.storage import StorageError, patiently
from model.agreement import on_main_process, raise_everywhere
from model.checkpoint_metadata import is_of_earlier_version
from model.errors import CheckpointError, ConfigError
from model.verify import VERIFY

MANIFEST = "manifest.json"
TENSORS = "state/"  # the folder of the tensors' files
BLOCK_BYTES = 2**30
READ_BYTES = 2**23

logger = logging.getLogger(__name__)


def write_manifest(folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """Write the manifest of a step folder that is otherwise complete. Collective.

    Every process reads back what it wrote itself: the checksums are of what the file system gives.

    Args:
        folder: The step folder.
        group: All processes, where another thread uses the default group at the same time.

    Raises:
        CheckpointError: a file cannot be read, or the manifest cannot be written.
    """
    sizes: dict[str, int] = {}
    on_main_process(lambda: sizes.update(_sizes(folder)), group)
    sizes = _from_main_process(sizes, group)
    own, problem = {}, None
    try:
        own = {block: _checksum(folder / block[0], block[1]) for block in _own_blocks(sizes)}
    except OSError as error:
        problem = f"{error.filename}: {error.strerror}"
    raise_everywhere(problem, group)
    everyone: list[dict[tuple[str, int], str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, own, group=group)
    checksums = {block: checksum for part in everyone for block, checksum in part.items()}
    files = {
        name: {"bytes": size, "xxh3_64": [checksums[name, number] for number in range(_block_count(size))]}
        for name, size in sizes.items()
    }
    on_main_process(lambda: write_json(folder / MANIFEST, {"block_bytes": BLOCK_BYTES, "files": files}), group)


def check_manifest(folder: Path, verify: str = "full") -> None:
    """Compare the files of a step folder with its manifest. Collective.

    A checkpoint of an earlier version, which wrote no manifest, is accepted with a warning.

    Args:
        folder: The step folder.
        verify: "full" compares sizes and checksums, "sizes" only sizes.

    Raises:
        CheckpointError: a file is missing or has another content than the one that was saved.
        StorageError: a file cannot be read because storage fails.
        ConfigError: `verify` has another value.
    """
    if verify not in VERIFY:
        raise ConfigError(f"checkpoint.verify={verify!r}: choose {' or '.join(VERIFY)}")
    files: dict[str, Any] = {}
    on_main_process(lambda: files.update(_read_manifest(folder)))
    files = _from_main_process(files)
    if files and verify == "full":
        problem: str | StorageError | None
        try:
            problem = _damage(folder, files, _own_blocks(_bytes(files)))
        except StorageError as error:
            problem = error
        raise_everywhere(problem)


def file_entry(path: Path) -> dict[str, Any]:
    """Return a file's entry in a manifest."""
    size = path.stat().st_size
    return {"bytes": size, "xxh3_64": [_checksum(path, number) for number in range(_block_count(size))]}


def manifest_entries(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the files of a step folder's manifest, and the checksums of tensors by their Hugging Face names.

    Both are empty for a checkpoint of an earlier version. A checkpoint of a run has no checksums of tensors.

    Raises:
        CheckpointError: the manifest is missing or damaged.
    """
    if not _has_manifest(folder):
        return {}, {}
    files = parse_manifest(folder / MANIFEST)
    tensors = json.loads((folder / MANIFEST).read_bytes()).get("tensors", {})
    if not isinstance(tensors, dict) or not all(isinstance(entry, dict) for entry in tensors.values()):
        raise CheckpointError(f"{folder / MANIFEST} is damaged; use another step")
    return files, tensors


def check_files_alone(folder: Path, names: Iterable[str]) -> None:
    """Compare files with their checksums, in this process.

    Args:
        folder: The step folder.
        names: The files, as the manifest names them.

    Raises:
        CheckpointError: a file has another content than the one that was saved.
        StorageError: a file cannot be read because storage fails.
    """
    files = parse_manifest(folder / MANIFEST)
    blocks = ((name, number) for name in names for number in range(_block_count(files[name]["bytes"])))
    if problem := _damage(folder, files, blocks):
        raise CheckpointError(problem)


def check_alone(folder: Path, verify: str, *, only_small: bool) -> None:
    """Compare what one process can compare quickly: sizes, and the checksums of all files but the tensors'.

    A checkpoint of an earlier version, which wrote no manifest, is accepted.

    Args:
        folder: The step folder.
        verify: "full", or "sizes" to compare no checksums.
        only_small: Compare nothing of the tensors' files. They are many, and one process that looks at them is enough.

    Raises:
        CheckpointError: a file is missing or has another content than the one that was saved.
        StorageError: a file cannot be read because storage fails.
    """
    if not _has_manifest(folder):
        return
    files = parse_manifest(folder / MANIFEST)
    small = {name: entry for name, entry in files.items() if not name.startswith(TENSORS)}
    _compare_sizes(folder, small if only_small else files)
    blocks = ((name, number) for name, size in _bytes(small).items() for number in range(_block_count(size)))
    if verify == "full" and (problem := _damage(folder, small, blocks)):
        raise CheckpointError(problem)


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Return the files of the manifest, after comparing their sizes; nothing if an earlier version wrote none."""
    if not _has_manifest(folder):
        logger.warning(
            "%s has no %s, so damaged files would not be noticed: it is of an earlier version", folder, MANIFEST
        )
        return {}
    files = parse_manifest(folder / MANIFEST)
    _compare_sizes(folder, files)
    return files


def _has_manifest(folder: Path) -> bool:
    """Return whether a step folder has a manifest.

    Raises:
        CheckpointError: it has lost it.
    """
    if patiently((folder / MANIFEST).is_file, folder / MANIFEST):
        return True
    if not is_of_earlier_version(folder / TENSORS):
        raise CheckpointError(
            f"{folder / MANIFEST} is missing, so that damaged files would not be noticed; use another step, or copy "
            "the checkpoint again with all its files"
        )
    return False


def parse_manifest(file: Path) -> dict[str, Any]:
    """Return the files of a manifest.

    Raises:
        CheckpointError: it cannot be read, or is damaged.
        StorageError: it cannot be read because storage fails.
    """
    try:
        content = json.loads(patiently(file.read_bytes, file))
        files: dict[str, Any] = content["files"]
        wanted = {name: int(entry["bytes"]) for name, entry in files.items()}
        complete = content["block_bytes"] == BLOCK_BYTES and all(
            len(entry["xxh3_64"]) == _block_count(wanted[name]) for name, entry in files.items()
        )
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); use another step") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise CheckpointError(f"{file} is damaged; use another step")
    return files


def _compare_sizes(folder: Path, files: Mapping[str, Any]) -> None:
    for name, entry in files.items():
        size = entry["bytes"]
        try:
            found = patiently((folder / name).stat, folder / name).st_size
        except OSError as error:
            what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
            raise CheckpointError(f"{folder / name} {what}; use another step, or copy the checkpoint again") from None
        if found != size:
            raise CheckpointError(
                f"{folder / name} is damaged: it has {found:,} bytes and was saved with {size:,}; use another "
                "step, or copy the checkpoint again"
            )


def _damage(folder: Path, files: Mapping[str, Any], blocks: Iterable[tuple[str, int]]) -> str | None:
    """Return what is wrong with these blocks."""
    for name, number in blocks:
        try:
            if patiently(partial(_checksum, folder / name, number), folder / name) != files[name]["xxh3_64"][number]:
                return (
                    f"{folder / name} is damaged: its content is not what was saved (checksum of block {number}); use "
                    "another step, or copy the checkpoint again"
                )
        except OSError as error:
            return f"{folder / name} cannot be read: {error.strerror}; use another step"
    return None


# --- blocks -----------------------------------------------------------------------------------------------------------


def _sizes(folder: Path) -> dict[str, int]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def _bytes(files: Mapping[str, Any]) -> dict[str, int]:
    return {name: entry["bytes"] for name, entry in files.items()}


def _block_count(size: int) -> int:
    return max(1, -(-size // BLOCK_BYTES))


def _own_blocks(sizes: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """Yield this process's share of all blocks: of a file that rank R wrote (`__R_0.distcp`) the first is R's."""
    for name, size in sizes.items():
        writer = re.fullmatch(r"state/__(\d+)_\d+\.distcp", name)
        for number in range(_block_count(size)):
            if ((int(writer[1]) if writer else 0) + number) % dist.get_world_size() == dist.get_rank():
                yield name, number


def _checksum(path: Path, number: int) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb", buffering=0) as file:
        file.seek(number * BLOCK_BYTES)
        left = BLOCK_BYTES
        while left and (data := file.read(min(left, READ_BYTES))):
            digest.update(data)
            left -= len(data)
    return digest.hexdigest()


def _from_main_process(value: dict[str, Any], group: dist.ProcessGroup | None = None) -> dict[str, Any]:
    shared = [value]
    dist.broadcast_object_list(shared, src=0, group=group)
    return shared[0]
