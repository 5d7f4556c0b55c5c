"""Prompts as servers take them: one token for each image and video, and the encoded files beside the tokens.

A server expands each media token itself. Given tokens that are expanded already it expands them once more, and answers
as if nothing were wrong:

    in training     <|begin_of_image|> <|image|> <|image|> <|image|> <|image|> <|end_of_image|>
    sent            <|begin_of_image|> <|image|> <|end_of_image|>
    in training     <|begin_of_video|> <|begin_of_image|> <|image|> .. <|end_of_image|> 0.0 seconds .. <|end_of_video|>
    sent            <|begin_of_video|> <|video|> <|end_of_video|>

What the server has read comes back with the answer, and must be the tokens of training.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from data_pipeline.encoding.tokenizer import IMAGE, VIDEO, VIDEO_END, VIDEO_START, GlmTokenizer
from data_pipeline.media.image_files import decode_image
from rl.errors import EngineError
from rl.rollouts import RolloutPrompt

# What engines and this project decode to the same pixels. Others, such as 16 bits of grey, are sent decoded, as PNG.
_SENT_AS_STORED = {"JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"}
_PLAIN_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "CMYK"}


@dataclass(frozen=True, eq=False)
class ServedPrompt:
    """A prompt, made ready once for all rollouts of its group.

    Attributes:
        id: "shard.tar/KEY".
        ids: Its tokens as in training.
        sent_ids: The same with one token for each image and video.
        images: data: URLs of its images.
        videos: data: URLs of its videos.
    """

    id: str
    ids: list[int]
    sent_ids: list[int]
    images: tuple[str, ...]
    videos: tuple[str, ...]


def served_prompt(prompt: RolloutPrompt, tokenizer: GlmTokenizer) -> ServedPrompt:
    """Return a prompt as servers take it.

    Raises:
        EngineError: Its tokens have other numbers of images and videos than it has files.
    """
    ids = prompt.sample.input_ids.tolist()
    sent = unexpanded(ids, tokenizer)
    for kind, token, files in (("images", IMAGE, prompt.images), ("videos", VIDEO, prompt.videos)):
        found = sent.count(tokenizer.special[token])
        if found != len(files):
            raise EngineError(f"{prompt.id} has {len(files)} {kind} and {found} places for them: read its prompt again")
    videos = tuple(data_url("video/mp4", data) for data in prompt.videos)
    return ServedPrompt(prompt.id, ids, sent, tuple(image_url(data) for data in prompt.images), videos)


def unexpanded(ids: Sequence[int], tokenizer: GlmTokenizer) -> list[int]:
    """Return tokens with one `<|image|>` for each image, and one `<|video|>` for all that stands for a video."""
    image, start, end = tokenizer.image_id, tokenizer.special[VIDEO_START], tokenizer.special[VIDEO_END]
    sent: list[int] = []
    in_video = False
    for before, token in zip([-1, *ids], ids, strict=False):
        if token == end:
            in_video = False
        if not in_video and not (token == before == image):
            sent.append(token)
        if token == start:
            in_video = True
            sent.append(tokenizer.special[VIDEO])
    return sent


def image_url(data: bytes) -> str:
    """Return an image as a data: URL that engines decode to the pixels of training."""
    with Image.open(io.BytesIO(data)) as image:
        kind = image.format if image.mode in _PLAIN_MODES else None
    if kind in _SENT_AS_STORED:
        return data_url(f"image/{kind.lower()}", data)
    buffer = io.BytesIO()
    Image.fromarray(decode_image(data)).save(buffer, "PNG")
    return data_url("image/png", buffer.getvalue())


def data_url(kind: str, data: bytes) -> str:
    """Return a data: URL."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
