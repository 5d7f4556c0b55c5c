"""Pieces of a long sample are what one would cut out of the whole."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

from data_pipeline.domains import build_sample
from data_pipeline.encoding.batch import EncodedSample
from data_pipeline.encoding.encode import LongSample, encode_sample
from data_pipeline.encoding.rope_positions import rope_positions
from data_pipeline.errors import BadSample
from data_pipeline.media.pixel_budget import PixelBudget
from tests.data_pipeline.media_files import clip, encoded, pattern

BUDGET = PixelBudget(image_max_tokens=20, video_max_tokens=60)
RECORD = {
    "domain": "interleaved",
    "text": "One <image> and two <image><image>, then it moves: <video> and stands again. <image>",
}
PICTURES = [encoded(pattern(60 + 30 * n, 90, seed=n), name) for n, name in enumerate(("PNG", "JPEG", "WEBP", "JPEG"))]
CLIPS = [clip(17)]


def long_sample(tokenizer, pictures=PICTURES) -> LongSample:
    sample = build_sample(RECORD, images=4, videos=1)
    return LongSample(sample, pictures, CLIPS, tokenizer=tokenizer, budget=BUDGET, sample_id="shard.tar/7")


def encoded_whole(tokenizer) -> EncodedSample:
    sample = build_sample(RECORD, images=4, videos=1)
    return encode_sample(sample, PICTURES, CLIPS, tokenizer=tokenizer, budget=BUDGET)


def image_runs(whole: EncodedSample, tokenizer) -> list[np.ndarray]:
    """Where the <|image|> tokens of every picture and frame pair lie."""
    image = np.flatnonzero(whole.input_ids == tokenizer.image_id)
    return np.split(image, np.flatnonzero(np.diff(image) > 1) + 1)


def media_spans(whole: EncodedSample, tokenizer) -> list[tuple[int, int]]:
    """First and last (exclusive) token of every picture, and of the clip."""
    runs = image_runs(whole, tokenizer)
    pictures = [
        (run[0] - 1, run[-1] + 2) for run, frames in zip(runs, whole.frames_per_image, strict=True) if frames == 1
    ]
    clip_token = [
        np.flatnonzero(whole.input_ids == tokenizer.special[f"<|{end}_of_video|>"]) for end in ("begin", "end")
    ]
    return sorted([*pictures, (int(clip_token[0][0]), int(clip_token[1][0]) + 1)])


@pytest.mark.fast
def test_every_piece_is_cut_out_of_the_whole(tokenizer):
    whole, long = encoded_whole(tokenizer), long_sample(tokenizer)
    runs, spans = image_runs(whole, tokenizer), media_spans(whole, tokenizer)
    assert len(long) == len(whole)
    assert len(runs) == len(whole.grids) == len(whole.frames_per_image) > len(spans) == 5
    patches = torch.split(
        whole.patches, [h * w * n for (h, w), n in zip(whole.grids, whole.frames_per_image, strict=True)]
    )

    rng = np.random.default_rng(0)
    bounds = {0, len(whole), *(place for span in spans for place in span), *rng.integers(0, len(whole), 12)}
    good = 0
    for start, end in combinations(sorted(int(bound) for bound in bounds), 2):
        if any(begin < cut < stop for begin, stop in spans for cut in (start, end)):
            with pytest.raises(BadSample, match="media_cut: a picture or clip does not lie wholly within"):
                long.piece(start, end - start)
            continue
        good += 1
        piece = long.piece(start, end - start)
        inside = [number for number, run in enumerate(runs) if start <= run[0] < end]
        assert piece.input_ids.tolist() == whole.input_ids[start:end].tolist()
        assert piece.loss.tolist() == whole.loss[start:end].tolist()
        assert piece.grids == tuple(whole.grids[number] for number in inside)
        assert piece.frames_per_image == tuple(whole.frames_per_image[number] for number in inside)
        assert torch.equal(piece.patches, torch.cat([whole.patches[:0], *(patches[number] for number in inside)]))
        assert np.array_equal(piece.position_ids, rope_positions(piece.input_ids == tokenizer.image_id, piece.grids))
        assert (piece.sample_id, piece.domain) == ("shard.tar/7", "interleaved")
    assert good > 30


@pytest.mark.fast
def test_only_the_pictures_of_a_piece_are_decoded(tokenizer):
    """The second picture is cut short: its header is whole, so only the piece that holds it fails."""
    long = long_sample(tokenizer, [data if n != 1 else data[: len(data) // 2] for n, data in enumerate(PICTURES)])
    begins = [begin for begin, _ in media_spans(encoded_whole(tokenizer), tokenizer)]
    outcomes: list[bool | str] = []
    for start, end in pairwise([0, *begins[1:], len(long)]):
        try:
            outcomes.append(len(long.piece(start, end - start).grids) > 0)
        except BadSample as error:
            outcomes.append(error.reason)
    assert outcomes == [True, "unreadable_image", True, True, True]
