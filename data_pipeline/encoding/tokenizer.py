"""Sample -> token ids, and which of them the model learns to predict.

Special tokens come only from the elements that name them. Text is encoded by a copy of the tokenizer that knows no
special tokens, so "<|user|>" typed by a user is plain bytes, however the tokenizer folder lists its tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from data_pipeline.encoding.generations import generation_of
from data_pipeline.errors import BadSample, DataError
from data_pipeline.media.image_sizes import tokens_of
from data_pipeline.media.video_sampling import VideoGeometry
from data_pipeline.sample import ASSISTANT_TAGS, ROLE_TOKENS, Element, Image, Sample, Text, Token, Video

PAD = "<|endoftext|>"
IMAGE, IMAGE_START, IMAGE_END = "<|image|>", "<|begin_of_image|>", "<|end_of_image|>"
VIDEO, VIDEO_START, VIDEO_END = "<|video|>", "<|begin_of_video|>", "<|end_of_video|>"
REQUIRED_TOKENS = (
    PAD,
    "[gMASK]",
    "<sop>",
    *ROLE_TOKENS.values(),
    IMAGE,
    IMAGE_START,
    IMAGE_END,
    VIDEO,
    VIDEO_START,
    VIDEO_END,
)


class GlmTokenizer:
    """A Hugging Face tokenizer folder. Tokens are read from its tokenizer.json alone.

    Its other files say for which generation of models it is.

    Attributes:
        folder: The folder.
        special: The id of every special token, by name.
        names: The name of every special token, by id.
        pad_id: The id of <|endoftext|>.
        image_id: The id of <|image|>.
        vocab_size: One more than the largest id: rows that a model's embedding must have.
        generation: How the models for which this tokenizer is see videos and write chats.
        hash: Changes if any text, or any video, could be encoded differently.
    """

    def __init__(self, folder: str | Path) -> None:
        """Read a folder.

        Raises:
            DataError: The folder has no tokenizer.json, lacks one of REQUIRED_TOKENS, is of another kind of model, or
                names processors of several generations.
        """
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            problem = f"{path} does not exist" if path.parent.is_dir() else f"there is no folder {folder}"
            raise DataError(
                f"{problem}: --tokenizer or data.tokenizer must be a Hugging Face folder with tokenizer.json"
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            self.special: dict[str, int] = {token["content"]: token["id"] for token in content["added_tokens"]}
            self._plain = Tokenizer.from_str(
                json.dumps({**content, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None})
            )
        except Exception as error:  # the Rust parser raises bare Exception
            raise DataError(f"{path} is not a tokenizer: {error}") from error
        missing = [name for name in REQUIRED_TOKENS if name not in self.special]
        if missing:
            raise DataError(f"{path} lacks the special tokens {' '.join(missing)}: it is not a tokenizer of GLM-V")
        vocabulary = content["model"]["vocab"]
        if not isinstance(vocabulary, dict):
            raise DataError(f"{path} holds a {content['model'].get('type')} model: it is not a tokenizer of GLM-V")
        self.folder = Path(folder)
        self.generation = generation_of(self.folder)
        decisive = {key: content.get(key) for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
        self.hash = (
            hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16] + self.generation.suffix
        )
        self.vocab_size = 1 + max(*self.special.values(), *vocabulary.values())
        self.names = {token: name for name, token in self.special.items()}
        self.pad_id, self.image_id = self.special[PAD], self.special[IMAGE]
        self._tags = re.compile(
            "|".join(f"({re.escape(tag)})" for tag in ASSISTANT_TAGS if tag in self.special) or "$^"
        )

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text: never a special token.

        Raises:
            BadSample: `bad_record`, if the text is not Unicode.
        """
        try:
            return self._plain.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError) as error:  # half of a surrogate pair, as "\ud83d" in JSON
            raise BadSample("bad_record", f"the text is not Unicode: {error}") from error

    def encode_tagged(self, text: str) -> list[int]:
        """Return the ids of text in which the tags that an assistant may write are special tokens."""
        ids: list[int] = []
        for part in filter(None, self._tags.split(text)):
            if part in ASSISTANT_TAGS and part in self.special:
                ids.append(self.special[part])
            else:
                ids += self.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ordinary tokens. Incomplete characters become U+FFFD."""
        return self._plain.decode(list(ids), skip_special_tokens=False)

    def token(self, name: str) -> int:
        """Return the id of a special token.

        Raises:
            BadSample: `missing_token`, if this tokenizer does not have it.
        """
        if name not in self.special:
            raise BadSample("missing_token", f"the tokenizer {self.folder} has no {name}")
        return self.special[name]


@dataclass(frozen=True)
class TokenizedSample:
    """The tokens of a sample."""

    input_ids: np.ndarray  # int64 [tokens]
    loss: np.ndarray  # bool [tokens], True where this token itself is to be predicted
    grids: tuple[tuple[int, int], ...]  # (h, w) in patches of every still image or frame pair, in order
    frames_per_image: tuple[int, ...]  # 1 for a still image, 2 for a frame pair
    blocks: tuple[tuple[int, int], ...]  # (start, length) in tokens of every image and video, with begin and end tokens


def tokenize(
    sample: Sample,
    tokenizer: GlmTokenizer,
    images: Sequence[tuple[int, int]] = (),
    videos: Sequence[VideoGeometry] = (),
) -> TokenizedSample:
    """Turn elements into token ids.

    Args:
        sample: Its elements.
        tokenizer: The tokenizer.
        images: (h, w) in patches of every image.
        videos: The geometry of every video.

    Raises:
        BadSample: The tokenizer lacks a token, or a text is not Unicode.
    """
    ids: list[np.ndarray] = []
    loss: list[np.ndarray] = []
    grids: list[tuple[int, int]] = []
    frames_per_image: list[int] = []
    media: list[tuple[int, int]] = []  # of each image and video: its first entry in `ids`, and the one after its last
    next_image, next_video = iter(images), iter(videos)

    def add(new_ids: Sequence[int], learn: bool) -> None:
        ids.append(np.asarray(new_ids, dtype=np.int64))
        loss.append(np.full(len(new_ids), learn))

    def add_image(grid: tuple[int, int], frames: int) -> None:
        add(
            [tokenizer.special[IMAGE_START], *[tokenizer.image_id] * tokens_of(grid), tokenizer.special[IMAGE_END]],
            False,
        )
        grids.append(grid)
        frames_per_image.append(frames)

    for element in _join_texts(sample.elements):
        first = len(ids)
        match element:
            case Token():
                add([tokenizer.token(element.name)], element.loss)
            case Text():
                encode = tokenizer.encode_tagged if element.tags else tokenizer.encode
                add(encode(element.text), element.loss)
            case Image():
                add_image(next(next_image), 1)
            case Video():
                geometry = next(next_video)
                add([tokenizer.special[VIDEO_START]], False)
                for timestamp in geometry.timestamps:
                    add_image(geometry.grid, 2)
                    add(_timestamp(tokenizer, timestamp), False)
                add([tokenizer.special[VIDEO_END]], False)
        if isinstance(element, Image | Video):
            media.append((first, len(ids)))
    starts = np.cumsum([0, *map(len, ids)]).tolist()
    blocks = tuple((starts[first], starts[end] - starts[first]) for first, end in media)
    return TokenizedSample(np.concatenate(ids), np.concatenate(loss), tuple(grids), tuple(frames_per_image), blocks)


def _join_texts(elements: Sequence[Element]) -> list[Element]:
    """Join neighbouring texts of the same loss and tags, so that they are encoded as at inference."""
    joined: list[Element] = []
    for element in elements:
        last = joined[-1] if joined else None
        if (
            isinstance(element, Text)
            and isinstance(last, Text)
            and (element.loss, element.tags) == (last.loss, last.tags)
        ):
            joined[-1] = Text(last.text + element.text, last.loss, last.tags)
        else:
            joined.append(element)
    return joined


@lru_cache(maxsize=8192)
def _timestamp(tokenizer: GlmTokenizer, timestamp: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(timestamp))
