"""What people have, as drafts of samples: files and folders of many kinds, each cut into units that are read alone.

A kind is one line of INPUTS and one frozen dataclass: `paths` first, then its options, each with a default.

    @dataclass(frozen=True)
    class Clips:
        paths: tuple[str, ...]
        fps: float = 2.0        # given on the command line as --set fps=1

    open_inputs(["clips/"], settings=["fps=1"])  ->  [("clips", Clips(paths=("clips/",), fps=1.0))]

A kind that takes folders gets them as they are; of any other, a folder stands for the files in it, sorted by path.
"""

from __future__ import annotations

import difflib
import os
import types
import typing
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Union

from data_pipeline.errors import DataError
from data_pipeline.inputs.draft import Input
from data_pipeline.inputs.names import files_below
from data_pipeline.shards.members import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS


@dataclass(frozen=True)
class Kind:
    """One kind of input. target: "module:Class" under data_pipeline.inputs, imported when it is first used (so that
    nobody needs a library for inputs that he does not have); suffixes: how its files end; help: one line.

    takes_folders: it is given folders themselves, and is what a folder is that holds a file of these suffixes."""

    target: str
    suffixes: tuple[str, ...]
    help: str
    takes_folders: bool = False

    def load(self) -> type[Any]:
        module, name = self.target.split(":")
        return getattr(import_module(f"data_pipeline.inputs.{module}"), name)


_UNPACKED_BY = {
    **{".gz": "gunzip", ".tgz": "gunzip", ".bz2": "bunzip2", ".xz": "unxz", ".zst": "unzstd", ".zip": "unzip"},
    **{".7z": "7z x", ".rar": "unrar x"},
}
_MEDIA_SUFFIXES = tuple(f".{extension}" for extension in (*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS))

# A kind without suffixes is never guessed: it is asked for with --kind.
INPUTS: dict[str, Kind] = {
    "jsonl": Kind("records.jsonl:JsonLines", (".jsonl", ".ndjson", ".json"), "records that name their files, chats"),
    "parquet": Kind(
        "records.parquet:Parquet", (".parquet",), "tables of text and pictures, as Hugging Face datasets have them"
    ),
    "folder": Kind(
        "records.folder:Folder", _MEDIA_SUFFIXES, "pictures or clips with captions beside them", takes_folders=True
    ),
    "tars": Kind("records.tars:Tars", (".tar",), "webdataset shards made elsewhere, img2dataset's too"),
    "pdf": Kind("documents.pdf:PdfDocuments", (".pdf",), "papers, manuals and books, with their figures"),
    "slides": Kind("documents.pptx:Slides", (".pptx",), "presentations"),
    "html": Kind("documents.web:HtmlPages", (".html", ".htm", ".xhtml"), "web pages with their pictures"),
    "markdown": Kind("documents.web:MarkdownFiles", (".md", ".markdown"), "Markdown with its pictures"),
    "text": Kind("documents.plain_text:TextFiles", (".txt", ".text"), "plain text, a sample a file"),
    "pages": Kind("ocr.pages:PdfPages", (), "pages of PDFs as pictures, with their text to read (OCR)"),
    "page_pairs": Kind(
        "ocr.pages:PagePairs", (), "pictures of pages with markup beside them (OCR)", takes_folders=True
    ),
    "rendered_text": Kind(
        "ocr.rendered_text:RenderedText", (), "text files drawn with real fonts (OCR)", takes_folders=True
    ),
    "scene_text": Kind("ocr.scene_text:SceneText", (), "pictures with their words boxed (OCR)", takes_folders=True),
    "grounding": Kind("grounding.boxed_captions:Grounding", (), "captions with boxes of their phrases, COCO instances"),
    "gui": Kind(
        "grounding.gui:Gui", (), "screenshots of local web pages with boxes of their elements", takes_folders=True
    ),
    "clips": Kind("video.clips:Clips", (), "clips with timed captions: subtitles, JSON lines", takes_folders=True),
}


def open_inputs(paths: Sequence[str], kind: str = "", settings: Sequence[str] = ()) -> list[tuple[str, Input]]:
    """The inputs that these paths stand for, as (kind, input), in the order in which kinds first appear.

    kind: the kind of all of them; empty: found from suffixes and from what folders hold. settings: "option=value", each
    known to at least one of the kinds. Raises DataError naming the path or option and the mend.
    """
    if kind and kind not in INPUTS:
        raise DataError(f"--kind {kind} is unknown{_nearest(kind, INPUTS)}; kinds are:\n{describe_kinds()}")
    given: dict[str, list[str]] = {}
    for path in paths:
        if (command := _UNPACKED_BY.get(Path(path).suffix.lower())) and Path(path).is_file():
            raise DataError(
                f"{path} is compressed, and is read in many places at once: unpack it first, with {command}"
            )
        name = kind or _kind_of(Path(path))
        given.setdefault(name, []).extend(_expand(Path(path), name))
    for files in given.values():
        if twice := [file for file, count in Counter(map(os.path.realpath, files)).items() if count > 1]:
            raise DataError(f"{twice[0]} is given twice: its samples would be doubled")
    options = {name: dict[str, Any]() for name in given}
    for setting in settings:
        _set(setting, options)
    return [(name, INPUTS[name].load()(paths=tuple(files), **options[name])) for name, files in given.items()]


def describe_kinds() -> str:
    """All kinds, one a line, with a star those that are never guessed."""
    return "\n".join(f"  {name + '*' * (not kind.suffixes):14} {kind.help}" for name, kind in INPUTS.items())


def options_of(kind: str) -> dict[str, Any]:
    """The options of a kind: name -> type."""
    cls = INPUTS[kind].load()
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls) if field.name != "paths"}


def _kind_of(path: Path) -> str:
    if path.is_dir():
        return _kind_of_folder(path)
    if not path.is_file():
        hint = ": write --set before every option=value" if "=" in path.name else ""
        raise DataError(f"input {path} does not exist{hint}")
    for name, kind in INPUTS.items():
        if path.suffix.lower() in kind.suffixes:
            return name
    raise DataError(f"{path} is of no known kind: give --kind, one of\n{describe_kinds()}")


def _kind_of_folder(folder: Path) -> str:
    """The one kind that a folder's files are of; captions beside pictures and clips do not count."""
    files = list(files_below(folder))
    suffixes = Counter(path.suffix.lower() for path in files)
    held = [name for name, kind in INPUTS.items() if any(suffixes[suffix] for suffix in kind.suffixes)]
    if "folder" in held:  # what else may be there are its captions
        held = [name for name in held if name not in ("text", "jsonl")]
    if "tars" in held and not any(map(_is_input, files)):
        held = ["tars"]
    if len(held) == 1:
        return held[0]
    if held:
        raise DataError(f"{folder} holds files of several kinds ({', '.join(held)}): say which with --kind")
    packed = next((path for path in files if path.suffix.lower() in _UNPACKED_BY), None)
    hint = f" (unpack {packed.name} first, with {_UNPACKED_BY[packed.suffix.lower()]})" if packed is not None else ""
    raise DataError(f"{folder} holds nothing of a known kind{hint}; kinds are:\n{describe_kinds()}")


def _is_input(file: Path) -> bool:
    """Not a shard, and not what img2dataset writes of one: 00000.parquet and 00000_stats.json beside 00000.tar."""
    told_of = file.with_name(file.stem.removesuffix("_stats") + ".tar")
    known = any(file.suffix.lower() in kind.suffixes for kind in INPUTS.values())
    return known and file.suffix.lower() != ".tar" and not told_of.is_file()


def _expand(path: Path, name: str) -> list[str]:
    kind = INPUTS[name]
    if not path.exists():
        raise DataError(f"input {path} does not exist")
    if not path.is_dir() or kind.takes_folders:
        return [str(path)]
    files = sorted(str(file) for file in files_below(path) if file.suffix.lower() in kind.suffixes)
    if not files:
        raise DataError(f"{path} holds no files of kind {name} ({', '.join(kind.suffixes) or 'give files'})")
    return files


def _set(setting: str, options: dict[str, dict[str, Any]]) -> None:
    """Puts one "option=value" where the kinds that know it will find it."""
    name, equals, value = setting.partition("=")
    if not equals:
        raise DataError(f"--set {setting}: write option=value")
    known = {kind: options_of(kind) for kind in options}
    takers = [kind for kind in options if name in known[kind]]
    if not takers:
        of_all = sorted({option for of_kind in known.values() for option in of_kind})
        hint = f"{_nearest(name, of_all)} (options are {', '.join(of_all) or 'none'})"
        kinds = f"kind {' and '.join(options)}" if len(options) == 1 else f"kinds {', '.join(options)}"
        raise DataError(f"--set {name}: no such option of {kinds}{hint}")
    for kind in takers:
        options[kind][name] = _parsed(name, value, known[kind][name])


def _parsed(name: str, value: str, wanted: Any) -> Any:
    """The value of an option in the type that its field has."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is Literal:
        if value not in arguments:
            raise DataError(f"--set {name}={value}: use one of {', '.join(arguments)}")
        return value
    if origin is tuple:
        return tuple(_parsed(name, part.strip(), arguments[0]) for part in value.split(",") if part.strip())
    if origin in (Union, types.UnionType):  # X | None
        return _parsed(name, value, next(argument for argument in arguments if argument is not type(None)))
    try:
        return _PARSERS[wanted](value)
    except (ValueError, KeyError) as error:
        raise DataError(f"--set {name}={value}: give {_WANTED[wanted]}") from error


_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_PARSERS: dict[Any, Callable[[str], Any]] = {
    bool: lambda value: _BOOLEANS[value.lower()],
    int: int,
    float: float,
    str: str,
}
_WANTED = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def _nearest(name: str, known: Sequence[str] | dict[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f": did you mean {close[0]}?" if close else ""
