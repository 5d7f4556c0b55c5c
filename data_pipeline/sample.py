"""`Sample`: what every domain becomes before it is turned into tokens.

A sample is an ordered list of elements. The n-th `Image` element stands for the record's n-th image, the n-th `Video`
for its n-th video, so a sample names no files and can be built, shown and tested without decoding anything.

    Sample("image_text", (Token("[gMASK]"), Token("<sop>"), Image(), Text("A cat.", loss=True),
                          Token("<|endoftext|>", loss=True)))

Loss is on text and on single tokens, never on images: the model never learns to predict one.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """Plain text. Nothing in it becomes a special token, unless `tags` allows those of ASSISTANT_TAGS."""

    text: str
    loss: bool = False
    tags: bool = False


@dataclass(frozen=True)
class Token:
    """One special token, by name. Only the pipeline itself writes these."""

    name: str
    loss: bool = False


@dataclass(frozen=True)
class Image:
    """The next image: <|begin_of_image|>, one <|image|> per 2x2 patches, <|end_of_image|>."""


@dataclass(frozen=True)
class Video:
    """The next video: <|begin_of_video|>, every frame pair as an image followed by its second, <|end_of_video|>."""


Element = Text | Token | Image | Video

# The special token that begins a message of a role.
ROLE_TOKENS = {
    "system": "<|system|>",
    "user": "<|user|>",
    "assistant": "<|assistant|>",
    "tool": "<|observation|>",
}

# Special tokens that an assistant may write in its own text.
ASSISTANT_TAGS = (
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "<|begin_of_box|>",
    "<|end_of_box|>",
    "<tool_call>",
    "</tool_call>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
)


@dataclass(frozen=True)
class Sample:
    """One training example."""

    domain: str
    elements: tuple[Element, ...]

    def count(self, kind: type) -> int:
        """Return the number of elements of a type."""
        return sum(isinstance(element, kind) for element in self.elements)
