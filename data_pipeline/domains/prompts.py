"""Prompts: what a model is given to continue, in the form of its training data."""

from __future__ import annotations

from data_pipeline.domains.chat import NO_THINK
from data_pipeline.domains.documents import split_placeholders
from data_pipeline.errors import DataError
from data_pipeline.sample import Element, Image, Text, Token, Video


def document_prompt(prompt: str, *, images: int, videos: int) -> list[Element]:
    """Return the beginning of a pretraining document."""
    return [Token("[gMASK]"), Token("<sop>"), *place_media(prompt, images=images, videos=videos)]


def chat_prompt(prompt: str, *, images: int, videos: int, thinking: bool, form: str) -> list[Element]:
    """Return one turn of a user, up to where the assistant begins to write, as chat.render writes both.

    Args:
        prompt: What the user says.
        images: The number of images.
        videos: The number of videos.
        thinking: Whether the model is to think first.
        form: One of chat.CHAT_FORMS.

    Raises:
        DataError: The prompt stands for another number of images or videos, or the form always thinks.
    """
    if form == "glm41v" and not thinking:
        raise DataError("GLM-4.1V has no form for chats without thinking")
    content = place_media(prompt, images=images, videos=videos)
    turn: list[Element] = [Token("[gMASK]"), Token("<sop>"), Token("<|user|>"), Text("\n"), *content]
    if thinking:
        return [*turn, Token("<|assistant|>"), Text("\n")]
    empty_thought: list[Element] = [Text("\n"), Token("<think>"), Token("</think>"), Text("\n")]
    return [*turn, Token(NO_THINK), Token("<|assistant|>"), *empty_thought]


def place_media(prompt: str, *, images: int, videos: int) -> list[Element]:
    """Put images and videos where the prompt says <image> and <video>, or before it if it says neither.

    Raises:
        DataError: The prompt stands for another number of images or videos.
    """
    content = split_placeholders(prompt, loss=False)
    for kind, given, mark in ((Image, images, "<image>"), (Video, videos, "<video>")):
        marked = sum(isinstance(element, kind) for element in content)
        if marked not in (0, given):
            raise DataError(
                f"the prompt says {mark} {marked} times, but {given} are given; write {mark} once for each, or never"
            )
        if marked == 0:
            content = [*(kind() for _ in range(given)), *content]
    return content
