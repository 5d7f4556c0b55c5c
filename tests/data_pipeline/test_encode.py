"""Pieces of a long sample are what one would cut out of the whole."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from data_pipeline.domains import build_sample
from data_pipeline.encode import LongSample, PixelBudget, encode_sample, media_blocks
from data_pipeline.errors import BadSample
from data_pipeline.positions import rope_positions
from tests.data_pipeline.media import clip, encoded, pattern

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


@pytest.mark.fast
def test_every_piece_is_cut_out_of_the_whole(tokenizer):
    whole = encode_sample(build_sample(RECORD, images=4, videos=1), PICTURES, CLIPS, tokenizer=tokenizer, budget=BUDGET)
    long = long_sample(tokenizer)
    assert len(long) == len(whole)

    # Independently of begin and end tokens: where each image's tokens lie, and the clip from its first to its last.
    image = np.flatnonzero(whole.input_ids == tokenizer.image_id)
    runs = np.split(image, np.flatnonzero(np.diff(image) > 1) + 1)
    assert len(runs) == len(whole.grids) == len(whole.frames) > 5
    slices = [h * w * n for (h, w), n in zip(whole.grids, whole.frames, strict=True)]
    pixels = torch.split(whole.pixels, slices)
    pairs = [run for run, frames in zip(runs, whole.frames, strict=True) if frames == 2]
    spans = [(run[0] - 1, run[-1] + 2) for run, frames in zip(runs, whole.frames, strict=True) if frames == 1]
    video_end = int(np.flatnonzero(whole.input_ids == tokenizer.special["<|end_of_video|>"])[0])
    spans = sorted([*spans, (pairs[0][0] - 2, video_end + 1)])
    assert media_blocks(whole.input_ids, tokenizer).tolist() == [list(span) for span in spans]

    rng = np.random.default_rng(0)
    bounds = sorted({0, len(whole), *(place for span in spans for place in span), *rng.integers(0, len(whole), 12)})
    good = 0
    for start in bounds:
        for end in (bound for bound in bounds if bound > start):
            if any(begin < cut < stop for begin, stop in spans for cut in (start, end)):
                with pytest.raises(BadSample, match="media_cut: a picture or clip does not lie wholly within"):
                    long.piece(int(start), int(end - start))
                continue
            good += 1
            piece = long.piece(int(start), int(end - start))
            inside = [n for n, run in enumerate(runs) if start <= run[0] < end]
            assert piece.input_ids.tolist() == whole.input_ids[start:end].tolist()
            assert piece.loss.tolist() == whole.loss[start:end].tolist()
            assert piece.grids == tuple(whole.grids[n] for n in inside)
            assert piece.frames == tuple(whole.frames[n] for n in inside)
            assert torch.equal(piece.pixels, torch.cat([whole.pixels[:0], *(pixels[n] for n in inside)]))
            positions = rope_positions(piece.input_ids == tokenizer.image_id, piece.grids)
            assert np.array_equal(piece.position_ids, positions)
            assert (piece.sample_id, piece.domain) == ("shard.tar/7", "interleaved")
    assert good > 30


@pytest.mark.fast
def test_only_the_pictures_of_a_piece_are_decoded(tokenizer):
    """The second picture is cut short: its header is whole, so only the piece that holds it fails."""
    pictures = [data if n != 1 else data[: len(data) // 2] for n, data in enumerate(PICTURES)]
    long = long_sample(tokenizer, pictures)
    begins = [0, *media_blocks(long._tokens.input_ids, tokenizer)[1:, 0].tolist(), len(long)]
    outcomes = []
    for start, end in pairwise(begins):
        try:
            outcomes.append(len(long.piece(start, end - start).grids) > 0)
        except BadSample as error:
            outcomes.append(error.reason)
    assert outcomes == [True, "unreadable_image", True, True, True]
