"""Repeated samples, compared with brute force over all pairs, and photographs saved, scaled, cropped and mirrored."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import imagehash
import numpy as np
import pytest
from PIL import Image, ImageOps

from data_pipeline.curation.buckets import bucket_numbers, hamming_masks, hamming_tables, repeats_of
from data_pipeline.curation.candidate import Candidate, perceptual_hash
from data_pipeline.curation.duplicates import (
    DuplicateVideoPairs,
    ExactDuplicateImages,
    ExactDuplicateTexts,
    NearDuplicateImages,
    NearDuplicateTexts,
    band_rows,
)
from tests import prose
from tests.data_pipeline.curation.samples import PHOTOS, candidate, file_of, filtered, photo, video_of


def by_brute_force(owners: list[int], similar: Callable[[int, int], bool]) -> dict[int, int]:
    """Remove an owner if each of its items is similar to an item of an earlier kept owner."""
    kept: list[int] = []
    found: dict[int, int] = {}
    for owner in dict.fromkeys(owners):
        own = [item for item, its_owner in enumerate(owners) if its_owner == owner]
        originals = [next((other for other in kept if similar(item, other)), None) for item in own]
        if None in originals:
            kept += own
        else:
            found[owner] = owners[originals[0]]  # type: ignore[index]
    return found


def first_by(similar: Callable[[int, int], bool]) -> Callable[[int, list[int]], int | None]:
    return lambda item, others: next((other for other in others if similar(item, other)), None)


def clustered_hashes(count: int, seed: int) -> np.ndarray:
    """Return uint64 [count]: a few centres with up to eight bits flipped, so that there are pairs at all distances."""
    rng = np.random.default_rng(seed)
    centres = rng.integers(0, 2**63, 12).astype(np.uint64)
    flips = np.zeros(count, np.uint64)
    for _ in range(8):
        flips ^= np.uint64(1) << rng.integers(0, 64, count).astype(np.uint64)
        flips[rng.random(count) < 0.2] = 0
    return centres[rng.integers(0, len(centres), count)] ^ flips


@pytest.mark.parametrize("distance", [0, 1, 3, 4, 8])
@pytest.mark.parametrize("items_per_owner", [1, 3])
def test_near_hashes_equal_those_by_brute_force(distance: int, items_per_owner: int) -> None:
    hashes = clustered_hashes(400, seed=distance)
    owners = np.arange(len(hashes)) // items_per_owner * 5  # rows need not be consecutive

    def similar(item: int, other: int) -> bool:
        return (int(hashes[item]) ^ int(hashes[other])).bit_count() <= distance

    expected = by_brute_force(owners.tolist(), similar)
    assert len(expected) > 1
    assert repeats_of(owners, hamming_tables(hashes, distance), first_by(similar)) == expected


@pytest.mark.parametrize("count", [10, 1 << 22, 1 << 30])
@pytest.mark.parametrize("distance", [0, 4, 7])
def test_hashes_within_the_distance_are_equal_under_a_mask(count: int, distance: int) -> None:
    masks = hamming_masks(distance, count)
    rng = np.random.default_rng(count)
    for _ in range(300):
        flipped = sum(1 << int(bit) for bit in rng.choice(64, distance, replace=False))
        assert any(mask & flipped == 0 for mask in masks)


def test_chains_remove_nothing_and_items_are_compared_with_kept_ones_only() -> None:
    words = ["wood", "word", "ford", "wood", "lord"]
    compared = []

    def similar(item: int, other: int) -> bool:
        compared.append((words[item], words[other]))
        return sum(a != b for a, b in zip(words[item], words[other], strict=True)) <= 1

    tables = [bucket_numbers(np.array([word[:2] for word in words])), bucket_numbers(np.array([w[2:] for w in words]))]
    assert repeats_of(np.arange(5), tables, first_by(similar)) == {1: 0, 3: 0, 4: 2}
    assert compared == [("word", "wood"), ("wood", "wood"), ("lord", "ford")]


def test_no_samples_and_samples_without_features_repeat_nothing() -> None:
    for step in (NearDuplicateImages(), ExactDuplicateImages(), NearDuplicateTexts(), DuplicateVideoPairs()):
        assert filtered(step, []) == {}
        assert filtered(step, [candidate("!", domain="text")]) == {}


# --- images -----------------------------------------------------------------------------------------------------------


def altered() -> list[tuple[str, str, bytes]]:
    """Return (photograph, change, file) of many versions of every photograph."""
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


def test_images_saved_again_or_scaled_are_found_and_mirrored_or_cropped_ones_are_not() -> None:
    versions = altered()
    samples = [candidate(images=[data], name=f"{name}/{change}") for name, change, data in versions]
    removed = filtered(NearDuplicateImages(distance=4), samples)
    found = {(versions[row][0], versions[row][1]) for row in removed}
    assert found == {(name, change) for name in PHOTOS for change in ("jpeg", "webp", "half", "wider")}
    for row, verdict in removed.items():
        assert verdict.reason == "near_duplicate_image"
        assert verdict.detail == f"repeats {versions[row][0]}/png"


def test_perceptual_hash_equals_imagehash() -> None:
    for name in PHOTOS:
        assert f"{perceptual_hash(np.asarray(photo(name))):016x}" == str(imagehash.phash(photo(name)))


def test_a_sample_of_several_images_is_filtered_only_if_all_of_them_repeat() -> None:
    one, two, three = (file_of(photo(name)) for name in PHOTOS[:3])
    documents = [[one, two], [two, one], [one, three], [three], [two, two], [one, one]]
    samples = [candidate("<image>" * len(files), files, domain="interleaved") for files in documents]
    for step in (ExactDuplicateImages(), NearDuplicateImages()):
        assert sorted(filtered(step, samples)) == [1, 3, 4, 5]


def test_exact_duplicates_have_equal_pixels_or_equal_bytes() -> None:
    image = photo("chelsea.png")
    files = [file_of(image), file_of(image, compress_level=1), file_of(image), file_of(image, "JPEG")]
    files.append(file_of(image.resize(image.size[::-1])))
    samples = [candidate(images=[data]) for data in files]
    assert sorted(filtered(ExactDuplicateImages(), samples)) == [1, 2]
    assert sorted(filtered(ExactDuplicateImages(of="bytes"), samples)) == [2]
    # The same bytes in another shape are another image.
    stripes = np.zeros((40, 90, 3), np.uint8)
    shapes = [
        candidate(images=[file_of(Image.fromarray(stripes.reshape(shape)))]) for shape in ((40, 90, 3), (90, 40, 3))
    ]
    assert filtered(ExactDuplicateImages(), shapes) == {}


# --- texts ------------------------------------------------------------------------------------------------------------


def edited_texts(count: int, seed: int) -> list[str]:
    """Return texts of 120 words, and copies with 0 to 5 words replaced: some are above the limit, some below."""
    rng = np.random.default_rng(seed)
    words = prose.text().split()[-25 * 120 :]
    sections = [words[start : start + 120] for start in range(0, len(words), 120)]
    texts = []
    for number in range(count):
        edited = list(sections[number % len(sections)])
        for position in rng.choice(len(edited), rng.integers(0, 6), replace=False):
            edited[position] = f"w{rng.integers(10**6)}"
        texts.append(" ".join(edited))
    return texts


def true_similarity(one: str, other: str) -> float:
    """Return Jaccard's similarity on sequences of five words, without the filter's own functions."""
    first, second = (
        {tuple(words[i : i + 5]) for i in range(len(words) - 4)}
        for words in (one.lower().split(), other.lower().split())
    )
    return len(first & second) / len(first | second)


def plain(texts: list[str]) -> list[str]:
    return [" ".join("".join(c if c.isalnum() else " " for c in text).split()) for text in texts]


def by_table(table: np.ndarray) -> Callable[[int, int], bool]:
    return lambda one, other: bool(table[one, other])


def test_near_texts_equal_those_by_brute_force() -> None:
    texts = plain(edited_texts(150, seed=4))
    samples = [candidate(text, domain="text") for text in texts]
    similarities = np.array([[true_similarity(one, other) for one in texts] for other in texts])
    for similarity in (0.5, 0.8):
        expected = by_brute_force(list(range(len(texts))), by_table(similarities >= similarity))
        removed = filtered(NearDuplicateTexts(similarity=similarity), samples)
        assert len(expected) > 20
        assert set(removed) == set(expected)
        assert {verdict.reason for verdict in removed.values()} == {"near_duplicate_text"}


def test_no_text_is_filtered_by_chance() -> None:
    """With bands of one hash, pairs far below the limit are proposed too, and the texts themselves decide."""
    texts = plain(edited_texts(60, seed=5))
    removed = filtered(
        NearDuplicateTexts(similarity=0.8, permutations=2), [candidate(text, domain="text") for text in texts]
    )
    assert removed
    for row in removed:
        assert any(true_similarity(texts[row], texts[other]) >= 0.8 for other in range(row))


@pytest.mark.parametrize("similarity", [0.3, 0.5, 0.8, 0.9, 1.0])
def test_bands_miss_one_in_a_hundred_at_the_limit(similarity: float) -> None:
    rows = band_rows(similarity, 128)
    assert (1 - similarity**rows) ** (128 // rows) <= 0.01
    assert rows == 128 or (1 - similarity ** (rows + 1)) ** (128 // (rows + 1)) > 0.01


def test_exact_duplicate_texts_ignore_case_and_punctuation() -> None:
    texts = ["A cat.", "a  CAT", "A cat!", "A cat sat.", "猫。", "猫", "...", "!!!"]
    removed = filtered(ExactDuplicateTexts(), [candidate(text) for text in texts])
    assert {row: verdict.reason for row, verdict in removed.items()} == dict.fromkeys((1, 2, 5), "duplicate_text")


def test_half_of_a_surrogate_pair_does_not_raise() -> None:
    samples = [candidate(f"A cat {half} sat down.") for half in ("\ud83d", "\ud83e")]
    for step in (ExactDuplicateTexts(), NearDuplicateTexts()):
        assert sorted(filtered(step, samples)) == [1]


# --- videos -----------------------------------------------------------------------------------------------------------


def pan(name: str, step: int) -> list[np.ndarray]:
    """Return 24 frames of a window that moves over a photograph."""
    pixels = np.asarray(photo(name))
    return [pixels[20:148, step * index : step * index + 160] for index in range(24)]


def video_sample(frames: list[np.ndarray], words: str, **options: Any) -> Candidate:
    return candidate(words, videos=[video_of(frames, **options)], domain="video")


def test_videos_are_filtered_only_if_frames_and_words_are_the_same() -> None:
    cat, sea = pan("chelsea.png", 4), pan("coffee.png", 3)
    samples = [
        video_sample(cat, "A cat sleeps."),
        video_sample(cat, "a cat sleeps", crf="34"),  # encoded again
        video_sample(cat, "It turns its head."),  # other words
        video_sample(sea, "A cat sleeps."),  # other frames
        video_sample(
            [np.asarray(Image.fromarray(frame).resize((96, 64))) for frame in cat], "A cat sleeps."
        ),  # smaller
        video_sample(cat[::-1], "A cat sleeps."),  # backwards
        video_sample(sea, "A cat sleeps"),
    ]
    removed = filtered(DuplicateVideoPairs(), samples)
    assert {row: verdict.reason for row, verdict in removed.items()} == dict.fromkeys((1, 4, 6), "duplicate_video")


def test_hashes_of_different_photographs_are_far_apart() -> None:
    hashes = [perceptual_hash(np.asarray(photo(name))) for name in PHOTOS]
    assert min((one ^ other).bit_count() for one, other in combinations(hashes, 2)) > 8
