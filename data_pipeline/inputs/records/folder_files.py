"""What the files of a folder are for each other: images and videos, their captions, and lines that name them."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipeline.inputs.draft import Unit
from data_pipeline.inputs.media import CODE_SUFFIXES, has_media_name, is_media, read_head
from data_pipeline.inputs.names import SKIPPED_FOLDERS, beside, files_below, skipped_below
from data_pipeline.inputs.records.folder_captions import CAPTION_SUFFIXES, METADATA, composed, metadata_lines

UNIT_BYTES = 4 << 20
CONVERTIBLE = ("heic", "heif", "svg", "psd", "pdf", "jxl", "eps", "tga")  # another program converts them to JPEG or PNG
OTHER_KINDS = ("jsonl", "parquet", "tar", "pptx", "html", "htm")  # files that another kind reads


@dataclass
class _Files:
    """The files below a folder, and what belongs together."""

    media: list[tuple[str, int]] = field(default_factory=list)  # (path, bytes)
    captions: dict[str, list[str]] = field(default_factory=dict)  # path without suffix (composed) -> paths
    metadata: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)  # files that are not read, by what they are called
    lines: dict[str, list[Any]] = field(default_factory=dict)  # path (composed) -> [metadata file, index, index ...]
    rows: list[tuple[str, int]] = field(default_factory=list)  # (metadata file, index) of lines with several files
    left: list[tuple[str, int]] = field(default_factory=list)  # lines that no file uses


def folder_units(root: str, allow_outside: bool) -> Iterator[Unit]:
    """Yield the units of a folder, or of a single file. `extra` says what each file is; see `given_of`."""
    if Path(root).is_file():
        yield _single(Path(root), allow_outside)
        return
    files = _sort(root)
    _assign_lines(root, files, allow_outside)
    known = {composed(name): size for name, size in files.media}
    several = {
        path for metadata, at in files.rows for path in metadata_lines(root, metadata, allow_outside)[at].files
    } & known.keys()
    owned: set[str] = set()
    unit = _UnitOfFiles(root)
    for name, size in files.media:
        stem = _stem(name)
        if composed(name) in several and stem not in files.captions and composed(name) not in files.lines:
            continue
        own = [] if stem in owned else files.captions.get(stem, [])
        owned.add(stem)
        lines = files.lines.get(composed(name), []) if stem not in files.captions else []
        if unit.add(size, files=name, sizes=size, captions=len(own), lines=lines):
            yield unit.close()
    alone_in_rows = {path for path in several if _stem(path) not in files.captions and path not in files.lines}
    for metadata, at in files.rows:
        paths = [path for path in metadata_lines(root, metadata, allow_outside)[at].files if path in known]
        own_files = len(alone_in_rows.intersection(paths))
        alone_in_rows.difference_update(paths)
        if unit.add(sum(known[path] for path in paths), rows=[metadata, at, own_files]):
            yield unit.close()
    alone = [name for stem, names in files.captions.items() if stem not in owned for name in names]
    last = {"alone": alone, "metadata": files.metadata, "left": files.left, "others": dict(files.others)}
    if (files.media or files.metadata) and (unit.extra or any(last.values())):
        # A changed metadata file changes these checksums, so that the build is not resumed with it.
        checksums = [zlib.crc32(Path(root, name).read_bytes()) for name in files.metadata]
        unit.extra |= {**last, "checksums": checksums}
        yield unit.close()


def given_of(unit: Unit) -> dict[str, int]:
    """Count the files of a unit, and the lines of metadata files that its samples use or that none uses.

    A metadata file is counted by its lines, not as a file.
    """
    extra = unit.extra
    rows = extra.get("rows", ())
    files = len(extra.get("files", ())) + sum(extra.get("captions", ())) + sum(own for *_, own in rows)
    files += len(extra.get("alone", ()))
    files += sum(count for name, count in extra.get("others", {}).items() if name not in SKIPPED_FOLDERS)
    lines = sum(max(len(lines) - 1, 0) for lines in extra.get("lines", ())) + len(rows) + len(extra.get("left", ()))
    return {"files": files, **({"lines": lines} if lines else {})}


class _UnitOfFiles:
    """Collects the entries of a unit until it is large enough."""

    def __init__(self, root: str) -> None:
        self.root, self.bytes = root, 0
        self.extra: dict[str, Any] = {}

    def add(self, size: int, **entry: Any) -> bool:
        """Append to the lists of `extra`. Returns whether the unit is large enough."""
        for name, value in entry.items():
            self.extra.setdefault(name, []).append(value)
        self.bytes += size
        return self.bytes >= UNIT_BYTES

    def close(self) -> Unit:
        """Return the unit, and begin another one."""
        unit = Unit(self.root, bytes=self.bytes, extra=self.extra)
        self.bytes, self.extra = 0, {}
        return unit


def _sort(root: str) -> _Files:
    """Find out what each file below a folder is, from its name; from its content if the name says nothing."""
    files = _Files()
    files.others = skipped_below(root)
    below = sorted((file.relative_to(root).as_posix(), file.lstat().st_size) for file in files_below(Path(root)))
    for name, size in below:
        path = PurePosixPath(name)
        suffix = path.suffix.lower()
        if path.name in METADATA:
            files.metadata.append(name)
        elif suffix in CAPTION_SUFFIXES:
            files.captions.setdefault(_stem(name), []).append(name)
        elif _is_sample(Path(root, name)):
            files.media.append((name, size))
        else:
            files.others[f"file {suffix or path.name}"] += 1
    return files


def _is_sample(path: Path) -> bool:
    """Return whether a file is to become a sample, or to be rejected: not a README or a program."""
    suffix = path.suffix.lower()
    if suffix.lstrip(".") in (*CONVERTIBLE, *OTHER_KINDS) or (
        has_media_name(path.name) and suffix not in CODE_SUFFIXES
    ):
        return True
    return is_media(read_head(path))


def _assign_lines(root: str, files: _Files, allow_outside: bool) -> None:
    """Give each line to the file that it names. A file takes the lines of the nearest metadata file that names it."""
    media = {composed(name) for name, _ in files.media}
    depth = {name: (-name.count("/"), METADATA.index(PurePosixPath(name).name)) for name in files.metadata}
    for metadata in sorted(files.metadata, key=lambda name: depth[name]):
        for at, line in enumerate(metadata_lines(root, metadata, allow_outside)):
            if len(line.files) > 1:
                files.rows.append((metadata, at))
                continue
            path = line.files[0] if line.files else ""
            lines = (
                files.lines.setdefault(path, [metadata]) if path in media and not _has_caption(files, path) else None
            )
            if lines is not None and lines[0] == metadata:
                lines.append(at)
            else:
                files.left.append((metadata, at))


def _has_caption(files: _Files, path: str) -> bool:
    return _stem(path) in files.captions


def _single(path: Path, allow_outside: bool) -> Unit:
    """Return the unit of a single file, with the lines of the metadata file beside it."""
    size = path.stat().st_size
    lines: list[Any] = []
    for metadata in METADATA if beside(path, CAPTION_SUFFIXES) is None else ():
        if not lines and (path.parent / metadata).is_file():
            found = metadata_lines(str(path.parent), metadata, allow_outside)
            at = [index for index, line in enumerate(found) if line.files == (composed(path.name),)]
            lines = [metadata, *at] if at else []
    return Unit(str(path), bytes=size, extra={"files": [path.name], "sizes": [size], "captions": [0], "lines": [lines]})


def _stem(name: str) -> str:
    return composed(str(PurePosixPath(name).with_suffix("")))
