"""One sample's record and bytes -> `EncodedSample`: the work of a data worker for every sample.

A sample that is longer than a pack is a `LongSample`: tokenised once, then decoded piece by piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from data_pipeline.domains import build_sample
from data_pipeline.domains.chat import DEFAULT_FORM
from data_pipeline.encoding.batch import EncodedSample
from data_pipeline.encoding.rope_positions import rope_positions
from data_pipeline.encoding.tokenizer import GlmTokenizer, tokenize
from data_pipeline.errors import BadSample
from data_pipeline.media.image_files import probe_image
from data_pipeline.media.image_sizes import grid_of, resized_size
from data_pipeline.media.images import image_patches
from data_pipeline.media.pixel_budget import SLICE_BYTES, PixelBudget
from data_pipeline.media.video import video_patches
from data_pipeline.media.video_files import probe_video
from data_pipeline.media.video_sampling import video_geometry
from data_pipeline.sample import Image, Sample, Video


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
    """Build, decode and tokenise one sample.

    Raises:
        BadSample: The record or one of its images or videos cannot be used, or no token carries loss.
    """
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
    """Decode and tokenise a Sample, with or without loss.

    Raises:
        BadSample: An image or video cannot be used, or the tokenizer lacks a token.
    """
    decoded_images = [image_patches(data, budget.image_max_tokens) for data in images]
    decoded_videos = [video_patches(data, budget.video_max_tokens, tokenizer.generation.video) for data in videos]
    grids, geometries = [grid for _, grid in decoded_images], [geometry for _, geometry in decoded_videos]
    tokenized = tokenize(sample, tokenizer, grids, geometries)

    next_image, next_video = iter(decoded_images), iter(decoded_videos)
    slices = [torch.empty(0, SLICE_BYTES, dtype=torch.uint8)]
    for element in sample.elements:
        if isinstance(element, Image):
            slices.append(next(next_image)[0])
        elif isinstance(element, Video):
            slices.append(next(next_video)[0])
    return EncodedSample(
        sample_id=sample_id,
        domain=sample.domain,
        input_ids=tokenized.input_ids,
        loss=tokenized.loss,
        position_ids=rope_positions(tokenized.input_ids == tokenizer.image_id, tokenized.grids),
        patches=torch.cat(slices),
        grids=tokenized.grids,
        frames_per_image=tokenized.frames_per_image,
    )


@dataclass(frozen=True)
class _Medium:
    """An image or video that is not decoded yet."""

    data: bytes
    images: int  # rows of grid_thw: 1, or a video's frame pairs
    decode: Callable[[bytes, int], tuple[torch.Tensor, Any]]  # image_patches or video_patches
    max_tokens: int


class LongSample:
    """A sample that is longer than a pack, from which pieces are taken.

    Images and videos are measured by their headers, and decoded with the piece that they lie in: a document of a
    hundred pages is not decoded again for each of its pieces.
    """

    def __init__(
        self,
        sample: Sample,
        images: Sequence[bytes],
        videos: Sequence[bytes],
        *,
        tokenizer: GlmTokenizer,
        budget: PixelBudget,
        sample_id: str = "",
    ) -> None:
        """Tokenise a sample.

        Raises:
            BadSample: A header cannot be read, or the tokenizer lacks a token.
        """
        self.sample, self.sample_id = sample, sample_id
        self._image_id = tokenizer.image_id
        grids = [grid_of(resized_size(*probe_image(data), max_tokens=budget.image_max_tokens)) for data in images]
        form = tokenizer.generation.video
        geometries = [video_geometry(probe_video(data), budget.video_max_tokens, form) for data in videos]
        self._tokens = tokenize(sample, tokenizer, grids, geometries)
        undecoded_images = (_Medium(data, 1, image_patches, budget.image_max_tokens) for data in images)
        undecoded_videos = (
            _Medium(data, len(geometry.seconds), partial(video_patches, form=form), budget.video_max_tokens)
            for data, geometry in zip(videos, geometries, strict=True)
        )
        of_element: dict[type, Iterator[_Medium]] = {Image: undecoded_images, Video: undecoded_videos}
        self._media = [
            next(of_element[type(element)]) for element in sample.elements if isinstance(element, Image | Video)
        ]

    def __len__(self) -> int:
        return len(self._tokens.input_ids)

    def without_patches(self) -> EncodedSample:
        """Return the whole sample as its headers describe it, with nothing decoded."""
        return EncodedSample(
            sample_id=self.sample_id,
            domain=self.sample.domain,
            input_ids=self._tokens.input_ids,
            loss=self._tokens.loss,
            position_ids=rope_positions(self._tokens.input_ids == self._image_id, self._tokens.grids),
            patches=torch.empty(0, SLICE_BYTES, dtype=torch.uint8),
            grids=self._tokens.grids,
            frames_per_image=self._tokens.frames_per_image,
        )

    def piece(self, start: int, length: int, *, truncated: bool = False) -> EncodedSample:
        """Return tokens start..start+length as a sample of its own, with positions from 0.

        Args:
            start: The first token.
            length: The number of tokens.
            truncated: Whether the rest of the sample is never used (`data.too_long=truncate`).

        Raises:
            BadSample: `nothing_to_learn`, if the sample was truncated before its first token with loss: a chat before
                its answer, an image before its text; `media_cut`, if an image or video lies only partly within the
                piece; another reason, if one cannot be decoded.
        """
        end = start + length
        begins, lengths = np.array(self._tokens.blocks, dtype=np.int64).reshape(-1, 2).T
        ends = begins + lengths
        if ((begins < start) & (start < ends) | (begins < end) & (end < ends)).any():
            raise BadSample("media_cut", f"an image or video lies only partly within tokens {start} to {end}")
        loss = self._tokens.loss[start:end]
        if truncated and not loss.any():
            raise BadSample("nothing_to_learn", f"none of its first {length} tokens (of {len(self)}) carries loss")
        inside = np.flatnonzero((begins >= start) & (ends <= end))
        media = [self._media[number] for number in inside]
        before = sum(medium.images for medium in self._media[: inside[0]]) if len(inside) else 0
        images = slice(before, before + sum(medium.images for medium in media))
        grids, frames_per_image = self._tokens.grids[images], self._tokens.frames_per_image[images]
        decoded = [medium.decode(medium.data, medium.max_tokens)[0] for medium in media]
        patches = torch.cat([torch.empty(0, SLICE_BYTES, dtype=torch.uint8), *decoded])
        if len(patches) != sum(h * w * frames for (h, w), frames in zip(grids, frames_per_image, strict=True)):
            raise BadSample("media_mismatch", "an image or video does not have the size that its header says")
        input_ids = self._tokens.input_ids[start:end]
        return EncodedSample(
            sample_id=self.sample_id,
            domain=self.sample.domain,
            input_ids=input_ids,
            loss=loss,
            position_ids=rope_positions(input_ids == self._image_id, grids),
            patches=patches,
            grids=grids,
            frames_per_image=frames_per_image,
        )
