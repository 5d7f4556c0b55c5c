"""Encoded samples and packs as what a page shows of them: spans of tokens, pictures with boxes, lines of positions.

Everything is read back from the tensors that training would see. Text is left as it is: the page escapes it.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_pipeline.encoding.batch import Batch, EncodedSample
from data_pipeline.encoding.tokenizer import GlmTokenizer
from data_pipeline.errors import BadSample
from data_pipeline.media.boxes import written_boxes
from data_pipeline.media.images import MERGE_SIZE, PATCH_SIZE, tokens_of

MAX_PICTURES = 48  # of one sample; a long clip has hundreds of frame pairs
MAX_TOKENS = 4000  # of one sample, those of pictures aside
MAX_BOXES = 500  # of one picture
MAX_RECORD = 20_000  # characters
PICTURE_SIDE, FRAME_SIDE = 640, 240  # pixels of the longer side on the page
PLOT_POINTS = 400
_LABEL_CHARACTERS, _LABEL_SEARCHED = 24, 100


@dataclass(frozen=True)
class Span:
    """Neighbouring characters that the page shows alike. kind: `text`, `special` or `image`."""

    text: str
    kind: str
    learned: bool
    hint: str


@dataclass(frozen=True)
class Box:
    """In thousandths of the picture."""

    x1: float
    y1: float
    x2: float
    y2: float
    label: str


@dataclass(frozen=True)
class Picture:
    """A picture, or the two frames of a pair."""

    frames: list[str]  # data: URIs
    width: int
    height: int
    caption: str
    boxes: list[Box]


@dataclass(frozen=True)
class SequenceView:
    """One sample, or the part of one that a pack holds."""

    name: str
    domain: str
    facts: dict[str, str]
    pictures: list[Picture] = field(default_factory=list)
    more_pictures: int = 0
    spans: list[Span] = field(default_factory=list)
    more_tokens: int = 0
    record: str = ""
    more_record: int = 0
    failure: str = ""


@dataclass(frozen=True)
class Segment:
    """A stretch of a pack's bar. start and length in percent of the pack."""

    name: str
    domain: str
    start: float
    length: float


@dataclass(frozen=True)
class PackView:
    """A pack with its samples; without a title, just samples."""

    sequences: list[SequenceView]
    title: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    segments: list[Segment] = field(default_factory=list)
    lines: dict[str, str] = field(default_factory=dict)  # axis -> points of an SVG polyline, in a box of 1000 x 100
    quarantined: Counter[str] = field(default_factory=Counter)  # samples set aside, and how often


def view_of_failure(name: str, error: BadSample) -> SequenceView:
    return SequenceView(name, "", {}, failure=f"{error.reason}: {error.detail}")


def view_of_sample(
    sample: EncodedSample, tokenizer: GlmTokenizer, record: dict[str, Any] | None = None
) -> SequenceView:
    shown = _shown_tokens(sample, tokenizer)
    written = json.dumps(record, ensure_ascii=False, indent=1) if record else ""
    return SequenceView(
        name=sample.sample_id,
        domain=sample.domain,
        facts={
            "tokens": f"{len(sample):,}",
            "learned": f"{int(sample.loss[1:].sum()):,}",
            "images": f"{len(sample.grids):,}",
            "patches": f"{sum(h * w for h, w in sample.grids):,}",
            "positions": f"to {int(sample.position_ids.max()):,}",
            **({"from": str(record["source"])} if record and "source" in record else {}),
        },
        pictures=list(_pictures(sample, tokenizer)),
        more_pictures=max(0, len(sample.grids) - MAX_PICTURES),
        spans=list(_spans(sample, tokenizer, shown)),
        more_tokens=len(sample) - shown,
        record=written[:MAX_RECORD],
        more_record=max(0, len(written) - MAX_RECORD),
    )


def view_of_pack(batch: Batch, tokenizer: GlmTokenizer, title: str) -> PackView:
    length = len(batch.input_ids)
    starts = batch.cu_seqlens.tolist()
    segments = [
        Segment(name or "padding", domain, 100 * start / length, 100 * useful / length)
        for name, domain, start, useful in zip(
            *(batch.sample_ids, batch.segment_domains, starts, batch.segment_lengths.tolist()), strict=False
        )
    ]
    return PackView(
        title=title,
        facts={
            "tokens": f"{batch.num_tokens:,} of {length:,} ({batch.num_tokens / length:.1%})",
            "learned": f"{batch.num_loss_tokens:,}",
            "samples": f"{batch.num_samples:,}",
            "images": f"{batch.num_images:,}",
            "patches": f"{batch.num_patches:,}",
            "cu_seqlens": " ".join(map(str, starts)),
        },
        segments=segments,
        lines={axis: _line(batch.position_ids[row]) for row, axis in enumerate(("time", "height", "width"))},
        sequences=[view_of_sample(sample, tokenizer) for sample in unpack(batch, tokenizer.image_id)],
        quarantined=Counter(
            f"{lost['shard']}/{lost['key']}: {lost['reason']}: {lost['detail']}" for lost in batch.quarantined
        ),
    )


def unpack(batch: Batch, image_id: int) -> Iterator[EncodedSample]:
    """The samples that `collate` put into a batch. A sample's first token is never learned, so nothing is lost."""
    grids = [(h, w) for _, h, w in batch.grid_thw.tolist()]
    frames = batch.frames_per_image.tolist()
    image = slice_ = 0
    for name, domain, start, length in zip(
        batch.sample_ids,
        batch.segment_domains,
        batch.cu_seqlens.tolist(),
        batch.segment_lengths.tolist(),
        strict=False,  # cu_seqlens has one more
    ):
        if not name:
            continue
        ids = batch.input_ids[start : start + length].numpy()
        room, first_image, first_slice = int((ids == image_id).sum()), image, slice_
        while room > 0:
            room -= tokens_of(grids[image])
            slice_ += grids[image][0] * grids[image][1] * frames[image]
            image += 1
        loss = np.zeros(length, dtype=bool)
        loss[1:] = batch.loss_mask[start : start + length - 1].numpy() > 0
        yield EncodedSample(
            sample_id=name,
            domain=domain,
            input_ids=ids,
            loss=loss,
            position_ids=batch.position_ids[:, start : start + length].numpy(),
            patches=batch.patches[first_slice:slice_],
            grids=tuple(grids[first_image:image]),
            frames_per_image=tuple(frames[first_image:image]),
        )


def unpatchify(slices: torch.Tensor, grid: tuple[int, int], instants: int) -> np.ndarray:
    """uint8 [h*w*instants, 588] -> RGB frames uint8 [instants, H, W, 3]: the inverse of `images.patchify`."""
    h, w = grid
    blocks = slices.reshape(
        *(h // MERGE_SIZE, w // MERGE_SIZE, MERGE_SIZE, MERGE_SIZE), *(instants, PATCH_SIZE, PATCH_SIZE, 3)
    )
    return blocks.permute(4, 0, 2, 5, 1, 3, 6, 7).reshape(instants, h * PATCH_SIZE, w * PATCH_SIZE, 3).numpy()


# --- tokens -----------------------------------------------------------------------------------------------------------


def _shown_tokens(sample: EncodedSample, tokenizer: GlmTokenizer) -> int:
    """How many of a sample's tokens the page shows. A picture's are one span, however many, and count for nothing."""
    of_text = np.cumsum(sample.input_ids != tokenizer.image_id)
    return int(np.searchsorted(of_text, MAX_TOKENS, side="right"))


def _spans(sample: EncodedSample, tokenizer: GlmTokenizer, shown: int) -> Iterator[Span]:
    """Runs of <|image|> as one span, special tokens one by one, text in pieces that are whole characters."""
    ids = sample.input_ids[:shown].tolist()
    for name, run in groupby(range(len(ids)), key=lambda place: tokenizer.names.get(ids[place])):
        places = list(run)
        if name is None:
            yield from _text(sample, tokenizer, places)
        elif ids[places[0]] == tokenizer.image_id:
            yield Span(f"{name} x {len(places)}", "image", False, _hint(sample, places[0]))
        else:
            yield from (Span(name, "special", bool(sample.loss[p]), _hint(sample, p)) for p in places)


def _text(sample: EncodedSample, tokenizer: GlmTokenizer, places: Sequence[int]) -> Iterator[Span]:
    """A token may hold part of a character, of 4 bytes at most: it is shown together with those that complete it."""
    begun: list[int] = []
    for place in places:
        begun.append(place)
        text = tokenizer.decode([int(sample.input_ids[p]) for p in begun])
        if "\N{REPLACEMENT CHARACTER}" not in text or len(begun) == 4 or place == places[-1]:
            yield Span(text, "text", bool(sample.loss[begun[0]]), _hint(sample, *begun))
            begun = []


def _hint(sample: EncodedSample, *places: int) -> str:
    time, height, width = sample.position_ids[:, places[0]].tolist()
    ids = " ".join(str(sample.input_ids[place]) for place in places)
    return f"token {places[0]}, id {ids}, position {time} {height} {width}"


def _line(positions: torch.Tensor) -> str:
    values = positions.tolist()
    highest = max(*values, 1)
    places = np.unique(np.linspace(0, len(values) - 1, PLOT_POINTS).astype(int)).tolist()
    return " ".join(f"{1000 * p / len(values):.1f},{100 - 100 * values[p] / highest:.1f}" for p in places)


# --- pictures ---------------------------------------------------------------------------------------------------------


def _pictures(sample: EncodedSample, tokenizer: GlmTokenizer) -> Iterator[Picture]:
    texts = _texts_after_images(sample, tokenizer)
    done = 0
    for number, (grid, instants) in enumerate(zip(sample.grids, sample.frames_per_image, strict=True)):
        if number == MAX_PICTURES:
            return
        count = grid[0] * grid[1] * instants
        frames = unpatchify(sample.patches[done : done + count], grid, instants)
        done += count
        height, width = frames.shape[1:3]
        what = f"{number}: {width} x {height}, {grid[1]} x {grid[0]} patches, {tokens_of(grid)} tokens"
        second = re.match(r"\d+", texts[number])
        caption = f"{second.group()} s, {what}" if instants == 2 and second else what
        side = PICTURE_SIDE if instants == 1 else FRAME_SIDE
        boxes = list(_boxes(texts[number])) if instants == 1 else []
        if len(boxes) > MAX_BOXES:
            caption, boxes = f"{caption}, {MAX_BOXES} of {len(boxes):,} boxes", boxes[:MAX_BOXES]
        yield Picture([_data_uri(frame, side) for frame in frames], width, height, caption, boxes)


def _texts_after_images(sample: EncodedSample, tokenizer: GlmTokenizer) -> list[str]:
    """The text between the n-th image and the next one: where its boxes stand, or the second of a frame pair."""
    texts: list[str] = []
    run: list[int] = []
    inside = False
    for token in sample.input_ids.tolist():
        if token == tokenizer.image_id:
            if not inside:
                texts.append(tokenizer.decode(run))
                run = []
            inside = True
        else:
            inside = False
            if token not in tokenizer.names:
                run.append(token)
    return [*texts[1:], tokenizer.decode(run)]


def _boxes(text: str) -> Iterator[Box]:
    """`... a cat [[102,80,540,910],[560,10,700,400]]`: what is written before them names them."""
    for place, (x1, y1, x2, y2) in written_boxes(text):  # invalid ones too: a mistake should be seen
        before = text[max(0, place - _LABEL_SEARCHED) : place]
        label = re.split(r"[\]\[.,;:!?\n]", before.rstrip("[,: "))[-1].strip()
        yield Box(x1, y1, x2, y2, label[-_LABEL_CHARACTERS:])


def _data_uri(frame: np.ndarray, side: int) -> str:
    image = Image.fromarray(frame)
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
