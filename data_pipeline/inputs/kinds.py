"""The registry of input kinds: which class reads which files of a user.

A kind is one entry of INPUTS and one frozen dataclass, whose first field is `paths`. The other fields are its options,
each with a default.

    @dataclass(frozen=True)
    class PdfPages:
        paths: tuple[str, ...]
        dpi: int = 144          # set on the command line with --set dpi=100

    open_inputs(["a.pdf"], "pages", ["dpi=100"])  ->  [("pages", PdfPages(paths=("a.pdf",), dpi=100))]

A kind that takes folders gets them unchanged. For any other kind, a folder stands for its files, sorted by path.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from common.nearest import suggestion
from data_pipeline.errors import DataError
from data_pipeline.inputs.draft import Input
from data_pipeline.inputs.media import CODE_SUFFIXES, is_media, read_head
from data_pipeline.inputs.names import files_below, skipped_below
from data_pipeline.inputs.options import parse_settings
from data_pipeline.shards.members import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS


@dataclass(frozen=True)
class Kind:
    """One kind of input."""

    target: str  # "module:Class"; a leading dot stands for data_pipeline.inputs
    suffixes: tuple[str, ...]  # of its files, with the dot; a kind without suffixes must be named with --kind
    help: str  # one line
    takes_folders: bool = False  # it gets folders unchanged, and is the kind of a folder that holds its files

    def load(self) -> type[Any]:
        """Import and return the class, so that the libraries of a kind are needed only where it is used."""
        module, name = self.target.split(":")
        return getattr(import_module(module, __package__), name)


_UNPACK_COMMANDS = {
    ".gz": "gunzip",
    ".tgz": "gunzip",
    ".bz2": "bunzip2",
    ".xz": "unxz",
    ".zst": "unzstd",
    ".zip": "unzip",
    ".7z": "7z x",
    ".rar": "unrar x",
}
_MEDIA_SUFFIXES = tuple(f".{extension}" for extension in (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS))

# Files about a data set, which no kind is guessed from.
_ABOUT_NAMES = ("readme", "license", "licence", "notice", "changelog", "citation", "dataset_infos", "dataset_info")
_ABOUT_SUFFIXES = ("", ".md", ".markdown", ".txt", ".html", ".json")

INPUTS: dict[str, Kind] = {
    "jsonl": Kind(
        ".records.jsonl:JsonLines", (".jsonl", ".ndjson", ".json"), "JSON records that name their media; conversations"
    ),
    "parquet": Kind(".records.parquet:Parquet", (".parquet",), "tables of text and images, as Hugging Face datasets"),
    "folder": Kind(
        ".records.folder:Folder", _MEDIA_SUFFIXES, "images or videos with captions beside them", takes_folders=True
    ),
    "tars": Kind(".records.tars:Tars", (".tar",), "webdataset shards from other tools, such as img2dataset"),
    "pdf": Kind(".documents.pdf:PdfDocuments", (".pdf",), "papers, manuals and books, with their figures"),
    "slides": Kind(".documents.pptx:Slides", (".pptx",), "presentations"),
    "html": Kind(".documents.web:HtmlPages", (".html", ".htm", ".xhtml"), "web pages with their images"),
    "markdown": Kind(".documents.web:MarkdownFiles", (".md", ".markdown"), "Markdown with its images"),
    "text": Kind(".documents.plain_text:TextFiles", (".txt", ".text"), "plain text, one sample per file"),
    "pages": Kind(".ocr.pages:PdfPages", (), "pages of PDFs as images, with their text (OCR)", takes_folders=True),
    "page_pairs": Kind(
        ".ocr.pages:PagePairs", (), "images of pages with their markup beside them (OCR)", takes_folders=True
    ),
    "rendered_text": Kind(
        ".ocr.rendered_text:RenderedText", (), "text files rendered with real fonts (OCR)", takes_folders=True
    ),
    "scene_text": Kind(".ocr.scene_text:SceneText", (), "images with boxes around words (OCR)", takes_folders=True),
    "grounding": Kind(
        ".grounding.boxed_captions:Grounding", (), "images with boxes of phrases or objects", takes_folders=True
    ),
    "gui": Kind(
        ".grounding.gui:Gui", (), "screenshots of local web pages with boxes of their elements", takes_folders=True
    ),
    "clips": Kind(
        ".video.clips:Clips", (), "videos with timed captions: subtitles, JSON lines; whole or cut", takes_folders=True
    ),
}


def open_inputs(paths: Sequence[str], kind: str = "", settings: Sequence[str] = ()) -> list[tuple[str, Input]]:
    """Return the inputs that the paths stand for, as (kind, input), in the order in which the kinds first appear.

    Args:
        paths: Files and folders.
        kind: The kind of all paths; empty: found from suffixes, and from the files in folders.
        settings: "option=value" each. At least one of the kinds must have the option.

    Raises:
        DataError: A path, kind or option cannot be used. The message says which and what to do.
    """
    if kind and kind not in INPUTS:
        raise DataError(f"--kind {kind} is unknown{suggestion(kind, INPUTS)}; kinds are:\n{describe_kinds()}")
    given: dict[str, list[str]] = {}
    for path in paths:
        if (command := _UNPACK_COMMANDS.get(Path(path).suffix.lower())) and Path(path).is_file():
            raise DataError(f"{path} is compressed, which does not allow random access: unpack it first with {command}")
        name = kind or _kind_of(Path(path))
        given.setdefault(name, []).extend(_expand(Path(path), name))
    for files in given.values():
        if repeated := [file for file, count in Counter(map(os.path.realpath, files)).items() if count > 1]:
            raise DataError(f"{repeated[0]} is given twice: its samples would be duplicated")
    classes = {name: INPUTS[name].load() for name in given}
    options = parse_settings(settings, classes)
    return [(name, classes[name](paths=tuple(files), **options[name])) for name, files in given.items()]


def skipped_files(paths: Sequence[str], inputs: Sequence[tuple[str, Input]]) -> Counter[str]:
    """Count the files in folders that no input reads, by name: {"file .log": 3, "hidden file": 1}.

    A kind that gets whole folders accounts for their files itself.

    Args:
        paths: Files and folders, as given to open_inputs.
        inputs: What open_inputs returned for them.
    """
    read = {os.path.abspath(path) for _, given in inputs for path in given.paths}
    skipped: Counter[str] = Counter()
    for path in filter(os.path.isdir, paths):
        if os.path.abspath(path) in read:
            continue
        skipped += skipped_below(path)
        for file in files_below(Path(path)):
            if os.path.abspath(file) not in read:
                skipped[f"file {file.suffix.lower() or file.name}"] += 1
    return skipped


def describe_kinds() -> str:
    """Return one line per kind. A star marks kinds that must be named with --kind."""
    return "\n".join(f"  {name + '*' * (not kind.suffixes):14} {kind.help}" for name, kind in INPUTS.items())


def _kind_of(path: Path) -> str:
    if path.is_dir():
        return _kind_of_folder(path)
    if not path.is_file():
        hint = ": write --set before every option=value" if "=" in path.name else ""
        raise DataError(f"input {path} does not exist{hint}")
    for name, kind in INPUTS.items():
        if path.suffix.lower() in kind.suffixes:
            return name
    raise DataError(f"the kind of {path} is unknown: name it with --kind, one of\n{describe_kinds()}")


def _kind_of_folder(folder: Path) -> str:
    """Return the one kind of the files in a folder. Captions beside images and videos do not count, nor do READMEs."""
    files = list(files_below(folder))
    own = [path for path in files if not _is_about_the_data(path)] or files
    suffixes = Counter(path.suffix.lower() for path in own)
    found = [name for name, kind in INPUTS.items() if any(suffixes[suffix] for suffix in kind.suffixes)]
    if "folder" in found and all(_is_code(path) for path in own if path.suffix.lower() in _MEDIA_SUFFIXES):
        found.remove("folder")
    if "folder" in found:  # text and JSON files beside media are captions
        found = [name for name in found if name not in ("text", "jsonl") or _names_media(name, own)]
    if "tars" in found and not any(map(_is_own_input, own)):
        found = ["tars"]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(_several_kinds(folder, found, own))
    packed = next((path for path in files if path.suffix.lower() in _UNPACK_COMMANDS), None)
    hint = f" (unpack {packed.name} first with {_UNPACK_COMMANDS[packed.suffix.lower()]})" if packed is not None else ""
    raise DataError(f"{folder} holds no file of a known kind{hint}; kinds are:\n{describe_kinds()}")


def _is_about_the_data(path: Path) -> bool:
    """Return whether a file tells people about a data set: README.md, LICENSE.txt, dataset_infos.json."""
    return path.suffix.lower() in _ABOUT_SUFFIXES and path.stem.lower() in _ABOUT_NAMES


def _is_code(path: Path) -> bool:
    """Return whether a file with the suffix of a video is a program in TypeScript."""
    return path.suffix.lower() in CODE_SUFFIXES and not is_media(read_head(path))


def _names_media(kind: str, files: Sequence[Path]) -> bool:
    """Return whether records of a kind lie beside media as files of their own: ann.json beside images/.

    A caption has the name of an image or video, and metadata.jsonl a fixed name.
    """
    media = {path.with_suffix("") for path in files if path.suffix.lower() in _MEDIA_SUFFIXES}
    folders = {image.parent for image in media}
    return kind == "jsonl" and any(
        path.suffix.lower() in INPUTS[kind].suffixes
        and path.name != "metadata.jsonl"
        and path.with_suffix("") not in media
        and path.parent not in folders
        for path in files
    )


def _several_kinds(folder: Path, found: Sequence[str], files: Sequence[Path]) -> str:
    """Say which kinds of files a folder holds, and the options that read each."""
    lines = []
    for name in found:
        of_kind = sorted(path for path in files if path.suffix.lower() in INPUTS[name].suffixes)
        first = of_kind[0].relative_to(folder)
        given = folder / first if len(of_kind) == 1 and name != "folder" else folder
        lines.append(f"  --kind {name:10} --input {given}   {len(of_kind):,} files, such as {first}")
    return f"{folder} holds files of several kinds ({', '.join(found)}): choose one with --kind\n" + "\n".join(lines)


def _is_own_input(file: Path) -> bool:
    """Return whether a file is neither a tar nor one of img2dataset's reports on a tar.

    img2dataset writes 00000.parquet and 00000_stats.json beside 00000.tar.
    """
    reported_on = file.with_name(file.stem.removesuffix("_stats") + ".tar")
    known = any(file.suffix.lower() in kind.suffixes for kind in INPUTS.values())
    return known and file.suffix.lower() != ".tar" and not reported_on.is_file()


def _expand(path: Path, name: str) -> list[str]:
    """Return the files and folders that a path stands for as an input of kind `name`."""
    kind = INPUTS[name]
    if not path.exists():
        raise DataError(f"input {path} does not exist")
    if not path.is_dir() or kind.takes_folders:
        return [str(path)]
    files = sorted(str(file) for file in files_below(path) if file.suffix.lower() in kind.suffixes)
    if not files:
        raise DataError(f"{path} holds no files of kind {name} ({', '.join(kind.suffixes)})")
    return files
