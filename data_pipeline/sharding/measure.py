"""Check that a sample can be trained on, and measure what the index keeps of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.domains import build_sample
from data_pipeline.domains.rl_record import RlRecord, read_rl_record
from data_pipeline.encoding.tokenizer import GlmTokenizer, tokenize
from data_pipeline.errors import BadSample, DataError
from data_pipeline.media.image_files import decode_image, probe_image
from data_pipeline.media.image_sizes import grid_of, resized_size
from data_pipeline.media.pixel_budget import PixelBudget
from data_pipeline.media.video import video_patches
from data_pipeline.media.video_files import VideoInfo, probe_video
from data_pipeline.media.video_sampling import GLM45V_VIDEO, VideoForm, video_geometry
from data_pipeline.sample import Image, Sample, Video
from data_pipeline.shards.index import index_row
from data_pipeline.shards.members import ShardSample
from data_pipeline.shards.prompt_facts import FactsRow, facts_row, hash_of
from data_pipeline.shards.reader import RawSample


@dataclass(frozen=True)
class Measured:
    """What the index keeps of a sample."""

    domain: str
    text_tokens: int  # all tokens but <|image|>; 0 without a tokenizer
    images: list[tuple[int, int]]  # (height, width) in pixels, before resizing
    videos: list[tuple[VideoInfo, int]]  # with the number of its frame pairs
    blocks: list[tuple[bool, int, int]]  # media between the text tokens, see index.index_row; [] without a tokenizer
    prompt: RlRecord | None = None  # of a sample of the domain `rl`
    asked: int = 0  # of such a sample: a hash of what the model is asked, without images and videos

    def index_row(self, sample: ShardSample) -> dict[str, Any]:
        """Return the row of the index for the sample as it is stored."""
        return index_row(sample, self.domain, self.text_tokens, self.images, self.videos, self.blocks)

    def facts_rows(self, sample: ShardSample) -> list[FactsRow]:
        """Return the row of the facts of prompts, if the sample is one."""
        if self.prompt is None:
            return []
        media = [(member.kind, member.xxh3) for member in sample.members if member.kind in ("image", "video")]
        return [facts_row(sample.key, self.prompt, hash_of([self.asked, media]))]


def measure(
    raw: RawSample,
    tokenizer: GlmTokenizer | None,
    chat_form: str,
    *,
    whole: bool = False,
    video_form: VideoForm | None = None,
) -> Measured:
    """Check that a sample can be trained on, and measure it.

    Args:
        raw: The record and the bytes of its media.
        tokenizer: None: text tokens are not counted.
        chat_form: How chats are written.
        whole: Decode every image, and every video up to the last frame that is sampled. Otherwise trust headers.
        video_form: How videos are sampled; by default as the models of the tokenizer do it, or GLM-4.5V without one.

    Raises:
        BadSample: the sample cannot be used.
    """
    form = video_form or (tokenizer.generation.video if tokenizer else GLM45V_VIDEO)
    try:
        return _measure(raw, tokenizer, chat_form, whole, form)
    except (DataError, OSError, MemoryError):
        raise
    except Exception as error:  # a library's bug on one file must not end a build of days
        raise BadSample("unreadable_sample", f"{type(error).__name__}: {error}") from error


def _measure(raw: RawSample, tokenizer: GlmTokenizer | None, chat_form: str, whole: bool, form: VideoForm) -> Measured:
    budget = PixelBudget()
    sample = build_sample(raw.record, images=len(raw.images), videos=len(raw.videos), chat_form=chat_form)
    if whole:
        images = [decode_image(data).shape[:2] for data in raw.images]
    else:
        images = [probe_image(data) for data in raw.images]
    infos = [probe_video(data) for data in raw.videos]
    grids = [grid_of(resized_size(*size, max_tokens=budget.image_max_tokens)) for size in images]
    if whole:
        geometries = [video_patches(data, budget.video_max_tokens, form)[1] for data in raw.videos]
    else:
        geometries = [video_geometry(info, budget.video_max_tokens, form) for info in infos]
    videos = [(info, len(geometry.seconds)) for info, geometry in zip(infos, geometries, strict=True)]
    prompt, asked = (read_rl_record(raw.record), _asked(sample)) if sample.domain == "rl" else (None, 0)
    if tokenizer is None:
        return Measured(sample.domain, 0, images, videos, [], prompt, asked)
    tokenized = tokenize(sample, tokenizer, grids, geometries)
    text_before = np.concatenate([[0], np.cumsum(tokenized.input_ids != tokenizer.image_id)]).tolist()
    is_video = [isinstance(element, Video) for element in sample.elements if isinstance(element, Image | Video)]
    blocks = [
        (video, text_before[start], text_before[start + length] - text_before[start])
        for video, (start, length) in zip(is_video, tokenized.blocks, strict=True)
    ]
    return Measured(sample.domain, text_before[-1], images, videos, blocks, prompt, asked)


def _asked(sample: Sample) -> int:
    """Return a hash of a prompt's text, and of where its images and videos stand."""
    return hash_of(
        [[type(each).__name__, getattr(each, "text", ""), getattr(each, "name", "")] for each in sample.elements]
    )
