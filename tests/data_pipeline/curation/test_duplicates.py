"""What repeats, against brute force over all pairs, and on real pictures saved, scaled, cropped and mirrored."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import imagehash
import numpy as np
import pytest
from PIL import Image, ImageOps

from data_pipeline.curation import buckets
from data_pipeline.curation.buckets import bucket_numbers, hamming_tables, repeats_of
from data_pipeline.curation.candidate import Candidate, perceptual_hash
from data_pipeline.curation.duplicates import (
    DuplicateVideoPairs,
    ExactDuplicateImages,
    ExactDuplicateTexts,
    NearDuplicateImages,
    NearDuplicateTexts,
    band_rows,
)
from tests.data_pipeline.curation.samples import PHOTOS, candidate, clip_of, dropped, file_of, photo


def by_brute_force(owners: list[int], alike: Callable[[int, int], bool]) -> dict[int, int]:
    """The rule in words: an owner goes if each of its items is like an item of an earlier owner that stays."""
    kept: list[int] = []
    found: dict[int, int] = {}
    for owner in dict.fromkeys(owners):
        own = [item for item, whose in enumerate(owners) if whose == owner]
        originals = [next((other for other in kept if alike(item, other)), None) for item in own]
        if None in originals:
            kept += own
        else:
            found[owner] = owners[originals[0]]  # type: ignore[index]
    return found


def first_by(alike: Callable[[int, int], bool]) -> Callable[[int, list[int]], int | None]:
    return lambda item, others: next((other for other in others if alike(item, other)), None)


def clustered_hashes(count: int, seed: int) -> np.ndarray:
    """uint64 [count]: few centres, with up to eight bits flipped, so that there are pairs at all distances."""
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 2**63, 12).astype(np.uint64)
    flips = np.zeros(count, np.uint64)
    for _ in range(8):
        flips ^= np.uint64(1) << rng.integers(0, 64, count).astype(np.uint64)
        flips[rng.random(count) < 0.2] = 0
    return centres[rng.integers(0, len(centres), count)] ^ flips


@pytest.mark.parametrize("distance", [0, 1, 3, 4, 8])
@pytest.mark.parametrize("owned", [1, 3], ids=["one-each", "several"])
def test_near_hashes_are_those_of_all_pairs(distance: int, owned: int) -> None:
    hashes = clustered_hashes(400, seed=distance)
    owners = np.arange(len(hashes)) // owned * 5  # rows need not be consecutive

    def alike(item: int, other: int) -> bool:
        return (int(hashes[item]) ^ int(hashes[other])).bit_count() <= distance

    expected = by_brute_force(owners.tolist(), alike)
    assert len(expected) > 1
    assert repeats_of(owners, hamming_tables(hashes, distance), first_by(alike)) == expected


@pytest.mark.parametrize("count", [10, 1 << 22, 1 << 30])
@pytest.mark.parametrize("distance", [0, 4, 7])
def test_whichever_tables_are_chosen_all_pairs_within_the_distance_share_a_bucket(count: int, distance: int) -> None:
    masks = min(
        (buckets._masks(distance, extra) for extra in (1, 2, 3)),
        key=lambda masks: buckets._expected_work(masks, count),
    )
    rng = np.random.default_rng(count)
    for _ in range(300):
        flipped = sum(1 << int(bit) for bit in rng.choice(64, distance, replace=False))
        assert any(mask & flipped == 0 for mask in masks)


def test_chains_carry_nothing_away_and_a_bucket_is_compared_with_what_stays() -> None:
    words = ["wood", "word", "ford", "wood", "lord"]
    compared = []

    def alike(item: int, other: int) -> bool:
        compared.append((words[item], words[other]))
        return sum(ours != theirs for ours, theirs in zip(words[item], words[other], strict=True)) <= 1

    tables = [bucket_numbers(np.array([word[:2] for word in words])), bucket_numbers(np.array([w[2:] for w in words]))]
    assert repeats_of(np.arange(5), tables, first_by(alike)) == {1: 0, 3: 0, 4: 2}
    assert compared == [("word", "wood"), ("wood", "wood"), ("lord", "ford")]


def test_nothing_repeats_in_nothing() -> None:
    for step in (NearDuplicateImages(), ExactDuplicateImages(), NearDuplicateTexts(), DuplicateVideoPairs()):
        assert dropped(step, []) == {}
        assert dropped(step, [candidate("!", domain="text")]) == {}


# --- pictures ---------------------------------------------------------------------------------------------------------


def altered() -> list[tuple[str, str, bytes]]:
    """(photograph, what was done to it, file) of every photograph in many guises."""
    found = []
    for name in PHOTOS:
        image = photo(name)
        width, height = image.size
        found += [
            (name, "png", file_of(image)),
            (name, "jpeg", file_of(image, "JPEG", quality=60)),
            (name, "webp", file_of(image, "WEBP", quality=70)),
            (name, "half", file_of(image.resize((width // 2, height // 2)), "JPEG")),
            (name, "wider", file_of(image.resize((width * 5 // 4, height)))),
            (name, "mirrored", file_of(ImageOps.mirror(image))),
            (name, "turned", file_of(image.rotate(90, expand=True))),
            (name, "cropped", file_of(image.crop((width // 4, height // 4, width, height)))),
        ]
    return found


def test_pictures_saved_anew_or_scaled_are_found_and_mirrored_or_cropped_ones_are_not() -> None:
    guises = altered()
    samples = [candidate(images=[data], name=f"{name}/{guise}") for name, guise, data in guises]
    gone = dropped(NearDuplicateImages(distance=4), samples)
    found = {(guises[row][0], guises[row][1]) for row in gone}
    assert found == {(name, guise) for name in PHOTOS for guise in ("jpeg", "webp", "half", "wider")}
    for row, drop in gone.items():
        assert drop.reason == "near_duplicate_image"
        assert drop.detail == f"repeats {guises[row][0]}/png"


def test_the_perceptual_hash_is_imagehash_s() -> None:
    for name in PHOTOS:
        assert f"{perceptual_hash(np.asarray(photo(name))):016x}" == str(imagehash.phash(photo(name)))


def test_a_sample_of_several_pictures_goes_only_if_all_of_them_repeat() -> None:
    one, two, three = (file_of(photo(name)) for name in PHOTOS[:3])
    documents = [[one, two], [two, one], [one, three], [three], [two, two], [one, one]]
    samples = [candidate("<image>" * len(files), files, domain="interleaved") for files in documents]
    for step in (ExactDuplicateImages(), NearDuplicateImages()):
        assert sorted(dropped(step, samples)) == [1, 3, 4, 5]


def test_equal_pixels_and_equal_bytes() -> None:
    image = photo("chelsea.png")
    files = [file_of(image), file_of(image, compress_level=1), file_of(image), file_of(image, "JPEG")]
    files.append(file_of(image.resize(image.size[::-1])))
    samples = [candidate(images=[data]) for data in files]
    assert sorted(dropped(ExactDuplicateImages(), samples)) == [1, 2]
    assert sorted(dropped(ExactDuplicateImages(of="bytes"), samples)) == [2]
    # The same bytes of pixels in another shape are another picture.
    stripes = np.zeros((40, 90, 3), np.uint8)
    shapes = [
        candidate(images=[file_of(Image.fromarray(stripes.reshape(shape)))]) for shape in ((40, 90, 3), (90, 40, 3))
    ]
    assert dropped(ExactDuplicateImages(), shapes) == {}


# --- texts ------------------------------------------------------------------------------------------------------------


def edited_texts(count: int, seed: int) -> list[str]:
    """Sections of Python's reference, cut to 120 words, and copies with words exchanged, so many as to lie on both
    sides of the limit."""
    from pydoc_data.topics import topics

    rng = np.random.default_rng(seed)
    sections = [words[:120] for text in topics.values() if len(words := text.split()) >= 120][:25]
    texts = []
    for number in range(count):
        words = list(sections[number % len(sections)])
        for place in rng.choice(len(words), rng.integers(0, 6), replace=False):
            words[place] = f"w{rng.integers(10**6)}"
        texts.append(" ".join(words))
    return texts


def true_similarity(one: str, other: str) -> float:
    """Jaccard's, on runs of five words, without the filter's own functions."""
    ours, theirs = (
        {tuple(words[i : i + 5]) for i in range(len(words) - 4)}
        for words in (one.lower().split(), other.lower().split())
    )
    return len(ours & theirs) / len(ours | theirs)


def plain(texts: list[str]) -> list[str]:
    return [" ".join("".join(c if c.isalnum() else " " for c in text).split()) for text in texts]


def alike_by(table: np.ndarray) -> Callable[[int, int], bool]:
    return lambda one, other: bool(table[one, other])


def test_near_texts_are_those_of_all_pairs() -> None:
    texts = plain(edited_texts(150, seed=4))
    samples = [candidate(text, domain="text") for text in texts]
    similar = np.array([[true_similarity(one, other) for one in texts] for other in texts])
    for similarity in (0.5, 0.8):
        expected = by_brute_force(list(range(len(texts))), alike_by(similar >= similarity))
        gone = dropped(NearDuplicateTexts(similarity=similarity), samples)
        assert len(expected) > 20
        assert set(gone) == set(expected)
        assert {drop.reason for drop in gone.values()} == {"near_duplicate_text"}


def test_none_goes_by_chance() -> None:
    """With bands of one hash nearly everything is proposed, and the texts themselves decide."""
    texts = plain(edited_texts(60, seed=5))
    step = NearDuplicateTexts(similarity=0.97, permutations=2)
    gone = dropped(step, [candidate(text, domain="text") for text in texts])
    for row in gone:
        assert any(true_similarity(texts[row], texts[other]) >= 0.97 for other in range(row))


@pytest.mark.parametrize("similarity", [0.3, 0.5, 0.8, 0.9, 1.0])
def test_bands_miss_one_in_a_hundred_at_the_limit(similarity: float) -> None:
    rows = band_rows(similarity, 128)
    assert (1 - similarity**rows) ** (128 // rows) <= 0.01
    assert rows == 128 or (1 - similarity ** (rows + 1)) ** (128 // (rows + 1)) > 0.01


def test_equal_words() -> None:
    texts = ["A cat.", "a  CAT", "A cat!", "A cat sat.", "猫。", "猫", "...", "!!!"]
    gone = dropped(ExactDuplicateTexts(), [candidate(text) for text in texts])
    assert {row: drop.reason for row, drop in gone.items()} == dict.fromkeys((1, 2, 5), "duplicate_text")


def test_half_of_a_surrogate_pair_is_no_reason_to_stop() -> None:
    samples = [candidate(f"A cat {half} sat down.") for half in ("\ud83d", "\ud83e")]
    for step in (ExactDuplicateTexts(), NearDuplicateTexts()):
        assert sorted(dropped(step, samples)) == [1]


# --- clips ------------------------------------------------------------------------------------------------------------


def pan(name: str, step: int) -> list[np.ndarray]:
    """A window that moves over a photograph, 24 frames."""
    pixels = np.asarray(photo(name))
    return [pixels[20:148, step * index : step * index + 160] for index in range(24)]


def film(frames: list[np.ndarray], words: str, **options: Any) -> Candidate:
    return candidate(words, videos=[clip_of(frames, **options)], domain="video")


def test_clips_go_only_if_pictures_and_words_are_the_same() -> None:
    cat, sea = pan("chelsea.png", 4), pan("coffee.png", 3)
    samples = [
        film(cat, "A cat sleeps."),
        film(cat, "a cat sleeps", crf="34"),  # saved anew
        film(cat, "It turns its head."),  # other words
        film(sea, "A cat sleeps."),  # other pictures
        film([np.asarray(Image.fromarray(frame).resize((96, 64))) for frame in cat], "A cat sleeps."),  # smaller
        film(cat[::-1], "A cat sleeps."),  # backwards
        film(sea, "A cat sleeps"),
    ]
    gone = dropped(DuplicateVideoPairs(), samples)
    assert {row: drop.reason for row, drop in gone.items()} == dict.fromkeys((1, 4, 6), "duplicate_video")


def test_photographs_are_far_apart() -> None:
    hashes = [perceptual_hash(np.asarray(photo(name))) for name in PHOTOS]
    assert min((one ^ other).bit_count() for one, other in combinations(hashes, 2)) > 8
