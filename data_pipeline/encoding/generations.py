"""The generations of GLM-V, which sample videos, write timestamps and write chats differently.

Which one applies follows from the classes that the files of a Hugging Face folder name, as it does in transformers:

    {"processor_class": "Glm46VProcessor", "video_processor_type": "Glm46VVideoProcessor"}    -> glm46v

A folder that names none is of GLM-4.5V or GLM-4.1V. The model type says little: GLM-4.6V has that of GLM-4.5V.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.media.video_sampling import VIDEO_FORMS, VideoForm


@dataclass(frozen=True)
class Generation:
    """Models whose processors are the same."""

    classes: str  # how the names of its classes begin, in lower case
    models: str
    video: VideoForm
    chat_forms: tuple[str, ...]  # of domains.chat.CHAT_FORMS; the first unless another is asked for
    suffix: str  # of the hash of a tokenizer, which says for whom an index was made


GENERATIONS = (
    Generation("glm4v", "GLM-4.5V or GLM-4.1V", VIDEO_FORMS["glm45v"], ("glm45v", "glm41v"), ""),
    Generation("glm46v", "GLM-4.6V", VIDEO_FORMS["glm46v"], ("glm46v",), "-glm46v"),
)
GLM4V = GENERATIONS[0]

# Files of a folder, and their keys that name classes. The image processors of all generations do the same, so their
# names decide only where nothing else does.
_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
)
_DECIDING, _IMAGES = ("processor_class", "video_processor_type"), ("image_processor_type",)


def generation_of(folder: Path) -> Generation:
    """Return the generation that the files of a folder name; that of GLM-4.5V and GLM-4.1V if they name none.

    Raises:
        DataError: As `named_generation`.
    """
    return named_generation(folder) or GLM4V


def named_generation(folder: Path) -> Generation | None:
    """Return the generation that the files of a folder name; None if they name none.

    Raises:
        DataError: A file is not JSON, or the files name processors of several generations.
    """
    files = {name: _read(folder / name) for name in (*_FILES, "config.json") if (folder / name).is_file()}
    named = [
        (f"{name}: {key} {value}", generation)
        for keys in (_DECIDING, _IMAGES)
        for name, content in files.items()
        for key, value in _values(content, keys)
        for generation in GENERATIONS
        if value.lower().startswith(generation.classes)
    ]
    model_type = files.get("config.json", {}).get("model_type")
    if model_type == "glm46v":  # GLM-4.6V-Flash; other model types are used by several generations
        named.insert(0, (f"config.json: model_type {model_type}", GENERATIONS[1]))
    if not named:
        return None
    first, found = named[0]
    for other, generation in named[1:]:
        if generation != found and "image_processor_type" not in other:
            raise DataError(
                f"{folder} mixes processors of {found.models} ({first}) and of {generation.models} ({other}), which "
                "sample videos and write their timestamps differently: copy all processor files from one model"
            )
    return found


def generation_of_hash(tokenizer_hash: str) -> Generation:
    """Return the generation for which an index was made."""
    return next((found for found in GENERATIONS[1:] if tokenizer_hash.endswith(found.suffix)), GLM4V)


def choose_chat_form(asked: str, generation: Generation) -> str:
    """Return the form in which chats are written: the one asked for, or that of the models.

    Raises:
        DataError: The models do not write chats in this form.
    """
    if asked and asked not in generation.chat_forms:
        raise DataError(
            f"chats cannot be written as {asked}, because the tokenizer is that of {generation.models}: use "
            f"--chat-form {' or '.join(generation.chat_forms)}, or the tokenizer of another model"
        )
    return asked or generation.chat_forms[0]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise DataError(f"{path} is not valid JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _values(content: dict[str, Any], keys: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield the values of keys at the top of a file, and in the processors that it describes."""
    parts = (content, content.get("image_processor"), content.get("video_processor"))
    for part in parts:
        if isinstance(part, dict):
            yield from ((key, part[key]) for key in keys if isinstance(part.get(key), str))
