"""Prompts to which a run shows the model's answers: their keys, their file, and their tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from data_pipeline.domains.prompts import chat_prompt, document_prompt
from data_pipeline.encoding.batch import EncodedSample
from data_pipeline.encoding.encode import encode_sample
from data_pipeline.encoding.tokenizer import GlmTokenizer
from data_pipeline.errors import DataError
from data_pipeline.media.pixel_budget import PixelBudget
from data_pipeline.sample import Sample
from model.config import ConfigError
from training.validation_config import PromptConfig

CHAT_FORMS = {"glm4v_moe": "glm45v", "glm4v": "glm41v"}  # how each variant of GLM-4.5V and GLM-4.1V writes chats


def chat_form_of(variant: str, tokenizer: GlmTokenizer) -> str:
    """Return how models of a variant write chats, if they have the processors for which the tokenizer is."""
    forms = tokenizer.generation.chat_forms
    return CHAT_FORMS[variant] if CHAT_FORMS[variant] in forms else forms[0]


@dataclass(frozen=True)
class Prompt:
    """A prompt that the model can be given."""

    config: PromptConfig
    sample: EncodedSample


def read_prompts(prompts: Sequence[PromptConfig], file: str) -> list[PromptConfig]:
    """Return the prompts of a configuration and those of its file.

    Raises:
        ConfigError: the file cannot be read, or a line is no prompt.
    """
    if not file:
        return list(prompts)
    path = Path(file)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # str.splitlines also splits at U+2028, a part of texts
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"validation.samples_file={file} cannot be read: {reason}") from None
    read = [_parse(line, f"{file}:{number}", path.parent) for number, line in enumerate(lines, 1) if line.strip()]
    if not read:
        raise ConfigError(f"validation.samples_file={file} holds no prompt: write one JSON object per line")
    return [*prompts, *read]


def _parse(line: str, where: str, folder: Path) -> PromptConfig:
    """Return the prompt of a line; its images and videos are relative to `folder`."""
    known = {item.name: type(getattr(PromptConfig(), item.name)) for item in fields(PromptConfig)}
    try:
        content: Any = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{where} is not a JSON object")
    for key, value in content.items():
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}; the keys of a prompt are {', '.join(known)}")
        strings = not isinstance(value, list) or all(isinstance(item, str) for item in value)
        if not isinstance(value, known[key]) or not strings:
            raise ConfigError(f"{where}: {key} is {value!r}; it must be a {known[key].__name__}")
    prompt = PromptConfig(**content)
    prompt.check(where)
    return replace(
        prompt,
        images=[str(folder / name) for name in prompt.images],
        videos=[str(folder / name) for name in prompt.videos],
    )


def encode_prompt(
    config: PromptConfig, tokenizer: GlmTokenizer, budget: PixelBudget, form: str, max_length: int
) -> Prompt:
    """Read the files of a prompt and tokenize it.

    Args:
        config: the prompt.
        tokenizer: of the run.
        budget: limits the size of images and videos.
        form: how chats are written.
        max_length: tokens that it may have.

    Raises:
        ConfigError: a file is missing or damaged, or the prompt is too long.
    """
    said = f"the prompt {config.prompt[:40]!r} of validation.samples"
    try:
        images, videos = ([Path(name).read_bytes() for name in names] for names in (config.images, config.videos))
        counts = {"images": len(images), "videos": len(videos)}
        if config.document:
            elements = document_prompt(config.prompt, **counts)
        else:
            elements = chat_prompt(config.prompt, thinking=config.thinking, form=form, **counts)
        sample = encode_sample(Sample("prompt", tuple(elements)), images, videos, tokenizer=tokenizer, budget=budget)
    except OSError as error:
        raise ConfigError(f"{said}: {error.filename} cannot be read: {error.strerror}") from None
    except DataError as error:
        raise ConfigError(f"{said}: {error}") from None
    if len(sample) > max_length:
        raise ConfigError(
            f"{said} has {len(sample):,} tokens; with validation.samples_max_tokens it exceeds train.seq_length: "
            "shorten it, or lower data.image_max_tokens, data.video_max_tokens or validation.samples_max_tokens"
        )
    return Prompt(config, sample)
