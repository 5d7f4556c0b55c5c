"""Filters of single samples: for each a sample that is kept and one that is filtered, with its reason."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.curation.candidate import Candidate, text_of
from data_pipeline.curation.filters import Filter, judge_sample
from data_pipeline.curation.images import Aspect, Resolution, SolidColour
from data_pipeline.curation.structure import Albums, Boxes
from data_pipeline.curation.texts import CaptionLength, LanguageMixing, RepeatedText, script_of, words_of
from data_pipeline.curation.videos import VideoIntegrity
from tests import prose
from tests.data_pipeline.curation.samples import PHOTOS, candidate, file_of, photo, video_of
from tests.data_pipeline.media_files import encoded, encoded_video, pattern

pytestmark = pytest.mark.fast


def image(width: int, height: int) -> bytes:
    return encoded(pattern(height, width))


def noisy(colour: tuple[int, int, int], level: int) -> bytes:
    noise = np.random.default_rng(0).integers(-level, level + 1, (120, 160, 1))
    return file_of(Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)))


def page(black_share: float) -> bytes:
    """Return a white image with a share of black rows."""
    pixels = np.full((200, 200, 3), 255, np.uint8)
    pixels[: round(200 * black_share)] = 0
    return file_of(Image.fromarray(pixels))


def album(images: int, words: int) -> Candidate:
    return candidate("<image> word " * words, [image(70, 70)] * images, domain="interleaved")


def grounding_sample(text: str) -> Candidate:
    return candidate(f"<image>{text}", [image(70, 70)], domain="grounding")


def video_sample(*, frames: int = 32, **options) -> Candidate:
    return candidate("A film.", videos=[encoded_video(frames, **options)], domain="video")


def still_video(level: int) -> Candidate:
    """Return four seconds of one grey frame."""
    frame = np.full((64, 96, 3), level, np.uint8)
    frame[20:30, 30:60] = min(level * 2, 255)
    return candidate("A film.", videos=[video_of([frame] * 32)], domain="video")


PROSE = (
    "The cat lay in the window all morning and watched the street below. A boy went by with a loaf under his arm, and "
    "two carts stopped at the corner, where an old man sold oranges and paper flowers to people who had time. When "
    "the bells rang at noon nobody looked up, because rain had begun to fall on roofs, chimneys and the empty square."
)
CASES: list[tuple[Filter, Candidate, str | None]] = [
    (Resolution(), candidate(images=[image(64, 64)]), None),
    (Resolution(), candidate(images=[image(200, 100), image(63, 64)]), "too_small"),
    (Resolution(max_pixels=10_000), candidate(images=[image(101, 100)]), "too_large"),
    (Resolution(min_side=65), video_sample(), "too_small"),
    (Resolution(), candidate(images=[b"not an image"]), "unreadable_image"),
    (Resolution(), candidate("Words.", domain="text"), None),
    (Aspect(), candidate(images=[image(80, 640)]), None),
    (Aspect(), candidate(images=[image(641, 80)]), "extreme_aspect"),
    (Aspect(max=1.4), video_sample(), "extreme_aspect"),
    (SolidColour(), candidate(images=[file_of(photo("coffee.png"))]), None),
    (SolidColour(), candidate(images=[page(0.03)]), None),
    (SolidColour(), candidate(images=[page(0.01)]), "solid_colour"),
    (SolidColour(), candidate(images=[noisy((200, 30, 30), 6)]), "solid_colour"),
    (SolidColour(tolerance=1), candidate(images=[noisy((90, 90, 90), 3)]), "low_contrast"),
    (SolidColour(), candidate(images=[noisy((200, 30, 30), 30)]), None),
    (CaptionLength(), candidate("A cat"), None),
    (CaptionLength(), candidate(" Cat \n"), "text_too_short"),
    (CaptionLength(), candidate("x" * 2001), "text_too_long"),
    (CaptionLength(), candidate("x" * 2001, domain="text"), None),
    (CaptionLength(domains=["text"]), candidate("x", domain="text"), "text_too_short"),
    (RepeatedText(), candidate(PROSE), None),
    (RepeatedText(), candidate("A cat and a dog and a cat."), None),
    (RepeatedText(), candidate("Buy now\nCheap\nBuy now\nBuy now"), "repeated_lines"),
    (RepeatedText(), candidate(f"{PROSE}\n\n{PROSE}"), "repeated_paragraphs"),
    (RepeatedText(), candidate("Read more " + PROSE[:100] + " read more" * 20), "repeated_words"),
    (RepeatedText(), candidate(" ".join(f"one two three four five six seven {n}" for n in range(9))), "repeated_words"),
    (RepeatedText(), candidate("哈" * 29), "repeated_characters"),
    (RepeatedText(), candidate("Wow" + "!" * 60), "repeated_characters"),
    (RepeatedText(), candidate("图中有一只猫，坐在窗边，看着外面的街道和行人。"), None),
    (LanguageMixing(), candidate(PROSE), None),
    (LanguageMixing(), candidate("这部手机是 iPhone 15，颜色为蓝色，容量二百五十六"), None),
    (LanguageMixing(), candidate("ひらがなとカタカナと漢字"), None),
    (LanguageMixing(), candidate("Кот сидит у окна the cat is sitting here"), "mixed_scripts"),
    (LanguageMixing(), candidate("12345 !!! ∑"), None),
    (LanguageMixing(expected=["latin", "cjk"]), candidate("Кот сидит у окна и смотрит"), "unexpected_script"),
    (
        LanguageMixing(expected=["latin", "cjk"]),
        candidate("Le chat noir, 黑猫坐在窗边看着街道", domain="text"),
        "mixed_scripts",
    ),
    (LanguageMixing(expected=["latin"]), candidate(PROSE + " α β"), None),
    (Albums(), album(4, 20), None),
    (Albums(), album(4, 19), "album"),
    (Albums(), album(3, 0), None),
    (Boxes(), grounding_sample("A cat [[0,0,999,999]] and a dog [[10,20,11,21]]"), None),
    (Boxes(), grounding_sample("Cats [[10, 20, 30, 40], [50,60,70,80]]"), None),
    (Boxes(), grounding_sample("A cat [[10,20,300,400]]"), "too_few_boxes"),
    (Boxes(), grounding_sample("[[10,20,300,400]] [[10,20,1000,400]]"), "too_few_boxes"),
    (Boxes(), grounding_sample("[[10,20,300,400]] [[300,20,10,400]] [[-1,2,3,4]] [[1,5,3,5]]"), "too_few_boxes"),
    (Boxes(min_boxes=1), grounding_sample("[[10,20,300,400]] and nonsense [[1,2,3]]"), None),
    (Boxes(), candidate("No boxes.", [image(70, 70)]), None),
    (VideoIntegrity(), video_sample(), None),
    (VideoIntegrity(), video_sample(frames=4), "video_too_short"),
    (VideoIntegrity(max_seconds=3), video_sample(), "video_too_long"),
    (VideoIntegrity(), candidate(videos=[encoded_video(64)[:-2000]], domain="video"), "unreadable_video"),
    (VideoIntegrity(), still_video(100), "frozen_video"),
    (VideoIntegrity(), still_video(4), "black_video"),
    (VideoIntegrity(), candidate("Words.", domain="text"), None),
]


@pytest.mark.parametrize(("step", "sample", "reason"), CASES, ids=range(len(CASES)))
def test_a_sample_is_kept_or_filtered_for_a_reason(step: Filter, sample: Candidate, reason: str | None) -> None:
    step.check()
    verdict = judge_sample(step, sample)
    assert (verdict.reason if verdict else None) == reason
    assert verdict is None or verdict.detail
    assert step.judge([sample, sample]) == [verdict, verdict]


def test_photographs_are_not_of_one_colour() -> None:
    assert not any(SolidColour()(candidate(images=[file_of(photo(name))])) for name in PHOTOS[:-1])


def test_real_prose_does_not_repeat_itself() -> None:
    texts = [text for text in prose.LICENSE.read_text(encoding="utf-8").split("\n\n\n") if len(text) > 400]
    assert texts
    assert [verdict.detail for text in texts if (verdict := RepeatedText()(candidate(text)))] == []


def test_shares_of_repeated_words_equal_a_count_by_hand() -> None:
    words = ["a", "b", "c", "a", "b", "c", "d", "a", "b", "c"]  # 10 words of one letter
    pairs = Counter(tuple(words[start : start + 2]) for start in range(9))
    assert pairs.most_common(1)[0][1] == 3
    keep = RepeatedText(min_words=1, max_top_words={2: 0.6}, max_repeated_words={3: 0.6}, max_characters=1)
    assert keep(candidate(" ".join(words))) is None
    top = RepeatedText(min_words=1, max_top_words={2: 0.59}, max_repeated_words={}, max_characters=1)
    assert "60.0%" in str(top(candidate(" ".join(words))))
    repeated = RepeatedText(min_words=1, max_top_words={}, max_repeated_words={3: 0.59}, max_characters=1)
    assert "60.0%" in str(repeated(candidate(" ".join(words))))


def test_words_are_split_by_script() -> None:
    assert words_of("The cat's 2 hats, 两顶 ｆｕｌｌ हिन्दी") == [
        "the",
        "cat",
        "s",
        "2",
        "hats",
        "两",
        "顶",
        "full",
        "हिन्दी",
    ]


def test_scripts_come_from_the_unicode_names_of_letters() -> None:
    assert [script_of(letter) for letter in "aЖ猫かカ한א1 𝐀"] == [
        "latin",
        "cyrillic",
        "cjk",
        "cjk",
        "cjk",
        "hangul",
        "hebrew",
        None,
        None,
        "latin",
    ]


def test_the_text_of_a_chat_includes_all_turns() -> None:
    record: dict[str, Any] = {
        "domain": "chat",
        "messages": [
            {"role": "user", "content": "<image>What is it?"},
            {"role": "assistant", "reasoning_content": "Whiskers.", "content": "A cat."},
        ],
    }
    assert text_of(record) == "What is it?\nWhiskers.\nA cat."
    record["messages"][1]["tool_calls"] = [{"name": "zoom", "arguments": {"on": "the café"}}]
    assert text_of(record).endswith('A cat.\n[{"name": "zoom", "arguments": {"on": "the café"}}]')
