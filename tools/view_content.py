"""What the page of tools.view shows of samples and packs: spans of tokens, images with boxes, lines of positions.

Everything is read back from the tensors that training gets. Text is not escaped here; the page does that.
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
from data_pipeline.media.image_sizes import tokens_of
from data_pipeline.media.images import unpatchify

MAX_IMAGES = 48  # per sample; a long video has hundreds of frame pairs
MAX_TOKENS = 4000  # per sample, not counting image tokens
MAX_BOXES = 500  # per image
MAX_RECORD = 20_000  # characters of a record
IMAGE_SIDE, FRAME_SIDE = 640, 240  # pixels of the longer side on the page
PLOT_POINTS = 400
_LABEL_CHARACTERS, _LABEL_SEARCHED = 24, 100


@dataclass(frozen=True)
class Span:
    """Neighbouring characters with the same formatting."""

    text: str
    kind: str  # text, special or image
    learned: bool  # carries loss
    hint: str  # shown when the pointer rests on it


@dataclass(frozen=True)
class BoxOverlay:
    """A box that is drawn over an image, in thousandths of its size."""

    x1: float
    y1: float
    x2: float
    y2: float
    label: str


@dataclass(frozen=True)
class ImageView:
    """A still image, or the two frames of a frame pair."""

    frames: list[str]  # data: URIs
    width: int
    height: int
    caption: str
    boxes: list[BoxOverlay]


@dataclass(frozen=True)
class SequenceView:
    """One sample, or the piece of one that a pack holds."""

    name: str
    domain: str
    facts: dict[str, str]
    images: list[ImageView] = field(default_factory=list)
    more_images: int = 0  # images that are not shown
    spans: list[Span] = field(default_factory=list)
    more_tokens: int = 0  # tokens that are not shown
    record: str = ""
    more_record: int = 0  # characters that are not shown
    failure: str = ""  # why the sample cannot be used


@dataclass(frozen=True)
class SegmentBar:
    """A segment in the bar that stands for a pack."""

    name: str
    domain: str
    start: float  # percent of the pack
    length: float  # percent of the pack, without padding


@dataclass(frozen=True)
class PackView:
    """A pack with its samples. Without a title: samples alone."""

    sequences: list[SequenceView]
    title: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    segments: list[SegmentBar] = field(default_factory=list)
    lines: dict[str, str] = field(default_factory=dict)  # by axis: points of an SVG polyline, 1000 x 100
    quarantined: Counter[str] = field(default_factory=Counter)  # descriptions of samples, and how often each


def view_of_failure(name: str, error: BadSample) -> SequenceView:
    """Return the view of a sample that cannot be used."""
    return SequenceView(name, "", {}, failure=f"{error.reason}: {error.detail}")


def view_of_sample(
    sample: EncodedSample, tokenizer: GlmTokenizer, record: dict[str, Any] | None = None
) -> SequenceView:
    """Return the view of an encoded sample, with its record if there is one."""
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
            **(_facts_of_prompt(record) if record and sample.domain == "rl" else {}),
        },
        images=list(_images(sample, tokenizer)),
        more_images=max(0, len(sample.grids) - MAX_IMAGES),
        spans=list(_spans(sample, tokenizer, shown)),
        more_tokens=len(sample) - shown,
        record=written[:MAX_RECORD],
        more_record=max(0, len(written) - MAX_RECORD),
    )


def _facts_of_prompt(record: dict[str, Any]) -> dict[str, str]:
    """Return how the answers to a prompt are scored, and what it is about."""
    names = ("reference", "verifier", "settings", "data_source", "category", "tier")
    return {name: str(record[name]) for name in names if record.get(name) not in (None, "", {})}


def view_of_pack(batch: Batch, tokenizer: GlmTokenizer, title: str) -> PackView:
    """Return the view of a pack."""
    length = len(batch.input_ids)
    starts = batch.cu_seqlens.tolist()
    segments = [
        SegmentBar(name or "padding", domain, 100 * start / length, 100 * useful / length)
        for name, domain, start, useful in zip(
            batch.sample_ids, batch.segment_domains, starts, batch.segment_lengths.tolist(), strict=False
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
    """Take a batch apart into the samples that `collate` put into it.

    The first token of a sample never carries loss, so the result equals the input of `collate`.
    """
    grids = [(h, w) for _, h, w in batch.grid_thw.tolist()]
    frames = batch.frames_per_image.tolist()
    image = row = 0  # of grid_thw, of patches
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
        image_tokens, first_image, first_row = int((ids == image_id).sum()), image, row
        while image_tokens > 0:
            image_tokens -= tokens_of(grids[image])
            row += grids[image][0] * grids[image][1] * frames[image]
            image += 1
        loss = np.zeros(length, dtype=bool)
        loss[1:] = batch.loss_mask[start : start + length - 1].numpy() > 0
        yield EncodedSample(
            sample_id=name,
            domain=domain,
            input_ids=ids,
            loss=loss,
            position_ids=batch.position_ids[:, start : start + length].numpy(),
            patches=batch.patches[first_row:row],
            grids=tuple(grids[first_image:image]),
            frames_per_image=tuple(frames[first_image:image]),
        )


# --- tokens -----------------------------------------------------------------------------------------------------------


def _shown_tokens(sample: EncodedSample, tokenizer: GlmTokenizer) -> int:
    """Return the number of tokens that the page shows. Image tokens are one span per image and are not counted."""
    of_text = np.cumsum(sample.input_ids != tokenizer.image_id)
    return int(np.searchsorted(of_text, MAX_TOKENS, side="right"))


def _spans(sample: EncodedSample, tokenizer: GlmTokenizer, shown: int) -> Iterator[Span]:
    """Yield one span per run of <|image|>, one per special token, and text in spans of complete characters."""
    ids = sample.input_ids[:shown].tolist()
    for name, run in groupby(range(len(ids)), key=lambda index: tokenizer.names.get(ids[index])):
        indices = list(run)
        if name is None:
            yield from _text(sample, tokenizer, indices)
        elif ids[indices[0]] == tokenizer.image_id:
            yield Span(f"{name} x {len(indices)}", "image", False, _hint(sample, indices[0]))
        else:
            yield from (Span(name, "special", bool(sample.loss[i]), _hint(sample, i)) for i in indices)


def _text(sample: EncodedSample, tokenizer: GlmTokenizer, indices: Sequence[int]) -> Iterator[Span]:
    """Yield tokens as text. Tokens that hold parts of one character (at most 4 bytes) are shown together."""
    begun: list[int] = []
    for index in indices:
        begun.append(index)
        text = tokenizer.decode([int(sample.input_ids[i]) for i in begun])
        if "\N{REPLACEMENT CHARACTER}" not in text or len(begun) == 4 or index == indices[-1]:
            yield Span(text, "text", bool(sample.loss[begun[0]]), _hint(sample, *begun))
            begun = []


def _hint(sample: EncodedSample, *indices: int) -> str:
    time, height, width = sample.position_ids[:, indices[0]].tolist()
    ids = " ".join(str(sample.input_ids[index]) for index in indices)
    return f"token {indices[0]}, id {ids}, position {time} {height} {width}"


def _line(positions: torch.Tensor) -> str:
    values = positions.tolist()
    highest = max(*values, 1)
    indices = np.unique(np.linspace(0, len(values) - 1, PLOT_POINTS).astype(int)).tolist()
    return " ".join(f"{1000 * i / len(values):.1f},{100 - 100 * values[i] / highest:.1f}" for i in indices)


# --- images -----------------------------------------------------------------------------------------------------------


def _images(sample: EncodedSample, tokenizer: GlmTokenizer) -> Iterator[ImageView]:
    texts = _texts_after_images(sample, tokenizer)
    done = 0
    for number, (grid, frame_count) in enumerate(zip(sample.grids, sample.frames_per_image, strict=True)):
        if number == MAX_IMAGES:
            return
        count = grid[0] * grid[1] * frame_count
        frames = unpatchify(sample.patches[done : done + count], grid, frame_count)
        done += count
        height, width = frames.shape[1:3]
        what = f"{number}: {width} x {height}, {grid[1]} x {grid[0]} patches, {tokens_of(grid)} tokens"
        second = re.match(r"\d+", texts[number])
        caption = f"{second.group()} s, {what}" if frame_count == 2 and second else what
        side = IMAGE_SIDE if frame_count == 1 else FRAME_SIDE
        boxes = list(_boxes(texts[number])) if frame_count == 1 else []
        if len(boxes) > MAX_BOXES:
            caption, boxes = f"{caption}, {MAX_BOXES} of {len(boxes):,} boxes", boxes[:MAX_BOXES]
        yield ImageView([_data_uri(frame, side) for frame in frames], width, height, caption, boxes)


def _texts_after_images(sample: EncodedSample, tokenizer: GlmTokenizer) -> list[str]:
    """Return the text after each image, up to the next: it holds the image's boxes, or the second of a frame pair."""
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


def _boxes(text: str) -> Iterator[BoxOverlay]:
    """Yield the boxes of a text such as `a cat [[102,80,540,910],[560,10,700,400]]`. The words before are the label."""
    for start, (x1, y1, x2, y2) in written_boxes(text):  # also invalid boxes, so that the user sees them
        before = text[max(0, start - _LABEL_SEARCHED) : start]
        label = re.split(r"[\]\[.,;:!?\n]", before.rstrip("[,: "))[-1].strip()
        yield BoxOverlay(x1, y1, x2, y2, label[-_LABEL_CHARACTERS:])


def _data_uri(frame: np.ndarray, side: int) -> str:
    image = Image.fromarray(frame)
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
