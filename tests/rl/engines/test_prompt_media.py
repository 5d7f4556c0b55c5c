"""Prompts as servers take them, against transformers' chat template and Pillow."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from data_pipeline.domains.prompts import chat_prompt
from data_pipeline.encoding.encode import encode_sample
from data_pipeline.encoding.tokenizer import GlmTokenizer
from data_pipeline.media.image_files import decode_image
from data_pipeline.media.pixel_budget import PixelBudget
from data_pipeline.sample import Sample
from rl.engines.prompt_media import image_url, served_prompt
from rl.errors import EngineError
from rl.rollouts import RolloutPrompt
from tests.data_pipeline import media_files

pytestmark = pytest.mark.fast

TEXT = "Which <image> is in which, and what moves in <video> after <image>?"


def make_prompt(tokenizer: GlmTokenizer) -> RolloutPrompt:
    """A prompt with two images of different sizes and a video, in the middle of its text."""
    images = [media_files.encoded(media_files.pattern(*size)) for size in ((56, 84), (140, 112))]
    videos = [media_files.encoded_video(16, height=56, width=84)]
    elements = chat_prompt(TEXT, images=2, videos=1, thinking=True, form="glm45v")
    sample = encode_sample(
        Sample("prompt", tuple(elements)), images, videos, tokenizer=tokenizer, budget=PixelBudget(6144, 30000)
    )
    return RolloutPrompt("a.tar/1", sample, tuple(images), tuple(videos), True)


def test_a_medium_is_sent_as_one_token(tokenizer_folder: Path) -> None:
    """The tokens are those of the text that transformers renders, which has one placeholder for each medium."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    parts = [{"type": "text", "text": "Which "}, {"type": "image"}, {"type": "text", "text": " is in which, and what "}]
    parts += [{"type": "text", "text": "moves in "}, {"type": "video"}, {"type": "text", "text": " after "}]
    message = {"role": "user", "content": [*parts, {"type": "image"}, {"type": "text", "text": "?"}]}
    expected = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    ours = GlmTokenizer(tokenizer_folder)
    prompt = make_prompt(ours)
    served = served_prompt(prompt, ours)
    assert served.sent_ids == tokenizer(expected, add_special_tokens=False).input_ids
    assert served.ids == prompt.sample.input_ids.tolist()
    assert len(served.ids) > len(served.sent_ids) + 20
    assert [base64.b64decode(url.partition(",")[2]) for url in (*served.images, *served.videos)] == [
        *prompt.images,
        *prompt.videos,
    ]


def test_a_file_that_is_missing_is_an_error(tokenizer_folder: Path) -> None:
    tokenizer = GlmTokenizer(tokenizer_folder)
    prompt = make_prompt(tokenizer)
    lacking = RolloutPrompt(prompt.id, prompt.sample, prompt.images[:1], prompt.videos, True)
    with pytest.raises(EngineError, match=r"a\.tar/1 has 1 images and 2 places for them"):
        served_prompt(lacking, tokenizer)


@pytest.mark.parametrize(
    ("mode", "kind", "sent"), [("I;16", "PNG", "png"), ("RGB", "PPM", "png"), ("L", "JPEG", "jpeg")]
)
def test_engines_decode_the_pixels_of_training(mode: str, kind: str, sent: str) -> None:
    """As vLLM decodes: opened with Pillow and converted to RGB, which of 16 bits leaves white."""
    grey = media_files.pattern(40, 60)[..., 0]
    pixels = {"I;16": grey.astype(np.uint16) * 257, "L": grey}.get(mode, media_files.pattern(40, 60))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    url = image_url(buffer.getvalue())
    assert url.startswith(f"data:image/{sent};base64,")
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
        found = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(found, decode_image(buffer.getvalue()))
