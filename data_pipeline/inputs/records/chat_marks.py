"""Marks by which chats of other tools stand for their images and videos, replaced by <image> and <video>.

    Qwen-VL       1: <img>cat.jpg</img>
    Qwen2-VL      <|vision_start|><|image_pad|><|vision_end|>
    GLM           <|begin_of_image|><|image|><|end_of_image|>
    InternVL      <img><IMG_CONTEXT></img>
    LLaVA         <im_start><image><im_end>
    XComposer     <ImageHere>
    others        <IMAGE>, <image1>, <image_2>, <|image_1|>, <image_placeholder>, [IMG], <image_soft_token>
    LLaVA-Video   <image> in a chat with a video and no image

They are replaced only if they stand for every file of the chat, each once. Otherwise the chat is rejected with the name
of the mark. In a chat without files a mark is text. So is a numbered one beside <image>: it refers to an image by name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import basename
from typing import Any

from data_pipeline.errors import BadSample
from data_pipeline.inputs.media import EXTENSIONS

# The placeholder with what surrounds it: LLaVA, XComposer, MiniCPM.
_WRAPPED = re.compile(
    r"<(?:im_start|img|Img|Image)><(image)><(?:im_end|/img|/Img|/Image)>|\(<(?:(image)|(video))>\./</(?:image|video)>\)"
)


@dataclass(frozen=True)
class _Kind:
    """The marks of images, or of videos."""

    placeholder: str
    tokens: re.Pattern[str]  # marks that stand for the next file, but the placeholder itself
    numbered: re.Pattern[str]  # marks that stand for a file by its number
    path: re.Pattern[str]  # marks that hold a path


def _kind(name: str, tokens: Sequence[str], tags: str) -> _Kind:
    extensions = "|".join((*EXTENSIONS[f"{name}s"], "jpeg"))
    wrapped = rf"<\|begin_of_{name}\|>\s*<\|{name}\|>\s*<\|end_of_{name}\|>"
    vision = rf"<\|vision_start\|>(?:<\|{name}_pad\|>)+<\|vision_end\|>"
    insensitive = (
        rf"(?!<{name}>)(?i:<{name}>|<{name}_?here>|<\|{name}\|>|<{name}_(?:placeholder|token|pad|soft_token)>)"
    )
    return _Kind(
        f"<{name}>",
        re.compile("|".join((wrapped, vision, rf"<\|{name}_pad\|>", insensitive, *tokens))),
        re.compile(rf"(?i)<\|?{name}[ _-]?(\d{{1,4}})\|?>"),
        re.compile(rf"<({tags})>([^<>\n]+\.(?i:{extensions})|data:[^<>\n]+)</\1>"),
    )


_KIMI = r"<\|media_start\|>image<\|media_content\|>(?:<\|media_pad\|>)+<\|media_end\|>"
_IMAGE_TOKENS = (
    r"<img>(?:<IMG_CONTEXT>)+</img>",
    "<IMG_CONTEXT>",
    "<start_of_image>",
    r"\[IMG\](?![^\[\n]*\[/IMG\])",
    _KIMI,
)
_KINDS = {"images": _kind("image", _IMAGE_TOKENS, "img|image"), "videos": _kind("video", (), "vid|video")}


def place_files(messages: list[dict[str, Any]], files: dict[str, list[str]]) -> dict[str, list[str]]:
    """Replace the marks in messages by placeholders, in place.

    Args:
        messages: Messages with a content of text.
        files: The files that the record lists, by "images" and "videos".

    Returns:
        The files in the order of their placeholders.

    Raises:
        BadSample: media_mismatch.
    """
    has_marks = any(_may_have_mark(turn["content"]) for turn in messages)
    placed = _placed_marks(messages, files) if has_marks else files
    images, videos = (_count(messages, kind.placeholder) for kind in _KINDS.values())
    if placed["videos"] and not placed["images"] and not videos and images == len(placed["videos"]):
        for turn in messages:
            turn["content"] = turn["content"].replace("<image>", "<video>")
    return placed


def _may_have_mark(text: str) -> bool:
    return "[IMG]" in text or text.count("<") > text.count("<image>") + text.count("<video>")


def _placed_marks(messages: list[dict[str, Any]], files: dict[str, list[str]]) -> dict[str, list[str]]:
    for turn in messages:
        if any(files.values()) and _WRAPPED.search(turn["content"]):
            turn["content"] = _WRAPPED.sub(lambda found: f"<{found[found.lastindex or 1]}>", turn["content"])
    return {field: _place(kind, messages, files[field], field) for field, kind in _KINDS.items()}


def replace_names(messages: list[dict[str, Any]], named: dict[str, str]) -> list[str]:
    """Replace marks that the record itself names, as MiniCPM-V: {"<image_00>": "cat.jpg"}. Returns files in order.

    Raises:
        BadSample: media_mismatch, if one does not appear exactly once.
    """
    for name in named:
        if (count := _count(messages, name)) != 1:
            raise BadSample("media_mismatch", f"{name} appears {count} times in the text, once is needed")
    pattern = re.compile("|".join(re.escape(name) for name in sorted(named, key=len, reverse=True)))
    order: list[str] = []
    for turn in messages:
        order += pattern.findall(turn["content"])
        turn["content"] = pattern.sub("<image>", turn["content"])
    return [named[name] for name in order]


def _place(kind: _Kind, messages: list[dict[str, Any]], files: list[str], field: str) -> list[str]:
    paths = [found[1] for turn in messages for found in kind.path.findall(turn["content"])]
    if paths:
        files = _named_files(paths, files, kind, messages, field)
        _replace(kind.path, messages, kind.placeholder)
        return files
    if not files:
        return files
    standing = _count(messages, kind.placeholder)
    tokens, numbered = (
        [found.group() for turn in messages for found in pattern.finditer(turn["content"])]
        for pattern in (kind.tokens, kind.numbered)
    )
    if standing == len(files) and not tokens:  # numbered marks refer to an image by name
        return files
    if not tokens and not numbered:
        return files
    shown = ", ".join(sorted({*tokens, *numbered}))[:200]
    if standing or (tokens and numbered):
        raise BadSample("media_mismatch", f"{shown} beside {standing} {kind.placeholder}: use one mark per file")
    if tokens:
        if len(tokens) != len(files):
            raise BadSample("media_mismatch", f"{len(tokens)} marks ({shown}) in the text but {len(files)} {field}")
        _replace(kind.tokens, messages, kind.placeholder)
        return files
    numbers = [int(number) for turn in messages for number in kind.numbered.findall(turn["content"])]
    first = min(numbers)
    if first > 1 or sorted(numbers) != list(range(first, first + len(files))):
        raise BadSample("media_mismatch", f"the marks {shown} do not name each of {len(files)} {field} once")
    _replace(kind.numbered, messages, kind.placeholder)
    return [files[number - first] for number in numbers]


def _named_files(
    paths: list[str], files: list[str], kind: _Kind, messages: list[dict[str, Any]], field: str
) -> list[str]:
    """Return the files that marks name: those of the record if these are the same, or have no names."""
    if any(kind.placeholder in kind.path.sub("", turn["content"]) for turn in messages):
        raise BadSample("media_mismatch", f"{kind.placeholder} beside a mark with a path ({paths[0][:80]})")
    if not files:
        return paths
    same = [basename(path) for path in paths] == [basename(file) for file in files]
    if len(files) != len(paths) or not (same or all(file.isdigit() for file in files)):
        raise BadSample("media_mismatch", f"the text names other {field} than the record: {paths[0][:80]}")
    return files


def _replace(pattern: re.Pattern[str], messages: list[dict[str, Any]], placeholder: str) -> None:
    for turn in messages:
        turn["content"] = pattern.sub(placeholder, turn["content"])


def _count(messages: list[dict[str, Any]], text: str) -> int:
    return sum(turn["content"].count(text) for turn in messages)
