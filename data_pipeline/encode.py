"""One sample's record and bytes -> `EncodedSample`: the work a data worker does for every sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from data_pipeline.batch import EncodedSample
from data_pipeline.domains import build_sample
from data_pipeline.domains.chat import DEFAULT_FORM
from data_pipeline.images import SLICE_BYTES, image_slices
from data_pipeline.positions import rope_positions
from data_pipeline.sample import Image, Sample, Video
from data_pipeline.tokens import GlmTokenizer, tokenize
from data_pipeline.video import video_slices


@dataclass(frozen=True)
class PixelBudget:
    """The largest a picture and a clip may become, in tokens."""

    image_max_tokens: int = 6144
    video_max_tokens: int = 30000


def encode_record(
    record: dict[str, Any],
    images: Sequence[bytes],
    videos: Sequence[bytes],
    *,
    tokenizer: GlmTokenizer,
    budget: PixelBudget,
    sample_id: str = "",
    chat_form: str = DEFAULT_FORM,
) -> EncodedSample:
    """Builds, decodes and tokenises one sample. Raises BadSample naming what is wrong with it."""
    sample = build_sample(record, images=len(images), videos=len(videos), chat_form=chat_form)
    return encode_sample(sample, images, videos, tokenizer=tokenizer, budget=budget, sample_id=sample_id)


def encode_sample(
    sample: Sample,
    images: Sequence[bytes],
    videos: Sequence[bytes],
    *,
    tokenizer: GlmTokenizer,
    budget: PixelBudget,
    sample_id: str = "",
) -> EncodedSample:
    """The same for a Sample that is already built."""
    pictures = [image_slices(data, budget.image_max_tokens) for data in images]
    clips = [video_slices(data, budget.video_max_tokens) for data in videos]
    tokenized = tokenize(sample, tokenizer, [grid for _, grid in pictures], [layout for _, layout in clips])

    next_picture, next_clip = iter(pictures), iter(clips)
    slices = [torch.empty(0, SLICE_BYTES, dtype=torch.uint8)]
    for segment in sample.segments:
        if isinstance(segment, Image):
            slices.append(next(next_picture)[0])
        elif isinstance(segment, Video):
            slices.append(next(next_clip)[0])
    return EncodedSample(
        sample_id=sample_id,
        domain=sample.domain,
        input_ids=tokenized.input_ids,
        loss=tokenized.loss,
        position_ids=rope_positions(tokenized.input_ids == tokenizer.image_id, tokenized.grids),
        pixels=torch.cat(slices),
        grids=tokenized.grids,
        frames=tokenized.frames,
    )
