"""Pieces of a long sample are cut out of the whole sample; a piece without loss is rejected."""

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
from tests.data_pipeline.media_files import encoded, encoded_video, pattern

BUDGET = PixelBudget(image_max_tokens=20, video_max_tokens=60)
RECORD = {
    "domain": "interleaved",
    "text": "One <image> and two <image><image>, then it moves: <video> and stands again. <image>",
}
IMAGES = [encoded(pattern(60 + 30 * n, 90, seed=n), name) for n, name in enumerate(("PNG", "JPEG", "WEBP", "JPEG"))]
VIDEOS = [encoded_video(17)]
CHAT = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": "The answer."}]


def long_sample(tokenizer, images=IMAGES) -> LongSample:
    sample = build_sample(RECORD, images=4, videos=1)
    return LongSample(sample, images, VIDEOS, tokenizer=tokenizer, budget=BUDGET, sample_id="shard.tar/7")


def encoded_whole(tokenizer) -> EncodedSample:
    sample = build_sample(RECORD, images=4, videos=1)
    return encode_sample(sample, IMAGES, VIDEOS, tokenizer=tokenizer, budget=BUDGET)


def image_runs(whole: EncodedSample, tokenizer) -> list[np.ndarray]:
    """Return the positions of the <|image|> tokens of every image and frame pair."""
    image = np.flatnonzero(whole.input_ids == tokenizer.image_id)
    return np.split(image, np.flatnonzero(np.diff(image) > 1) + 1)


def media_spans(whole: EncodedSample, tokenizer) -> list[tuple[int, int]]:
    """Return the first and last (exclusive) token of every image, and of the video."""
    runs = image_runs(whole, tokenizer)
    images = [
        (run[0] - 1, run[-1] + 2) for run, frames in zip(runs, whole.frames_per_image, strict=True) if frames == 1
    ]
    video_tokens = [
        np.flatnonzero(whole.input_ids == tokenizer.special[f"<|{end}_of_video|>"]) for end in ("begin", "end")
    ]
    return sorted([*images, (int(video_tokens[0][0]), int(video_tokens[1][0]) + 1)])


@pytest.mark.fast
def test_piece_equals_the_same_tokens_of_the_whole_sample(tokenizer):
    whole, long = encoded_whole(tokenizer), long_sample(tokenizer)
    runs, spans = image_runs(whole, tokenizer), media_spans(whole, tokenizer)
    assert len(long) == len(whole)
    assert len(runs) == len(whole.grids) == len(whole.frames_per_image) > len(spans) == 5
    patches = torch.split(
        whole.patches, [h * w * n for (h, w), n in zip(whole.grids, whole.frames_per_image, strict=True)]
    )

    rng = np.random.default_rng(0)
    bounds = {0, len(whole), *(bound for span in spans for bound in span), *rng.integers(0, len(whole), 12)}
    good = 0
    for start, end in combinations(sorted(int(bound) for bound in bounds), 2):
        if any(begin < cut < stop for begin, stop in spans for cut in (start, end)):
            with pytest.raises(BadSample, match="media_cut: an image or video lies only partly within"):
                long.piece(start, end - start)
            continue
        if start == 0 and not whole.loss[:end].any():
            continue  # test_piece_without_loss_at_the_beginning_is_rejected
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
def test_piece_decodes_only_its_own_images(tokenizer):
    """The second image is cut short after its header, so only the piece that holds it fails."""
    long = long_sample(tokenizer, [data if n != 1 else data[: len(data) // 2] for n, data in enumerate(IMAGES)])
    begins = [begin for begin, _ in media_spans(encoded_whole(tokenizer), tokenizer)]
    outcomes: list[bool | str] = []
    for start, end in pairwise([0, *begins[1:], len(long)]):
        try:
            outcomes.append(len(long.piece(start, end - start).grids) > 0)
        except BadSample as error:
            outcomes.append(error.reason)
    assert outcomes == [True, "unreadable_image", True, True, True]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("record", "images"),
    [
        ({"domain": "chat", "messages": CHAT, "thinking": False}, []),
        ({"domain": "image_text", "text": "A caption."}, IMAGES[:1]),
    ],
)
def test_piece_without_loss_at_the_beginning_is_rejected(tokenizer, record, images):
    """The first token with loss is the limit: one token less and there is nothing to learn."""
    sample = build_sample(record, images=len(images), videos=0)
    loss = encode_sample(sample, images, [], tokenizer=tokenizer, budget=BUDGET).loss
    first = int(np.flatnonzero(loss)[0])
    long = LongSample(sample, images, [], tokenizer=tokenizer, budget=BUDGET)
    with pytest.raises(BadSample, match=rf"nothing_to_learn: none of its first {first} tokens \(of {len(loss)}\)"):
        long.piece(0, first, truncated=True)
    assert not long.piece(0, first).loss.any()  # with split, the next piece has the loss
    assert long.piece(0, first + 1, truncated=True).loss.tolist() == [False] * first + [True]
