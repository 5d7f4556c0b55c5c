"""Relevance of captions to images, by a tiny random CLIP of transformers and by a user's own function."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from data_pipeline.curation.relevance import ClipScorer, Relevance
from data_pipeline.errors import DataError
from tests.data_pipeline.curation.samples import PHOTOS, candidate, file_of, photo

TEXTS = [f"A photograph, {name}, number {number} of several." for number, name in enumerate(PHOTOS)]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(3)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    # CLIP embeds a text by its end token, which it finds by eos_token_id.
    text = {**small, "vocab_size": 600, "max_position_embeddings": 60, "eos_token_id": 1, "bos_token_id": 0}
    vision = {**small, "image_size": 56, "patch_size": 14}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    CLIPModel(config).eval().save_pretrained(folder)
    sides = {"crop_size": {"height": 56, "width": 56}, "size": {"shortest_edge": 56}}
    CLIPImageProcessorPil(**sides).save_pretrained(folder)
    # Every byte, alone and at the end of a word, and no merges: a trained tokenizer with end_of_word_suffix has other
    # numbers each time, and so other scores.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    return folder


def test_scores_equal_the_logits_of_clip(clip_folder: Path) -> None:
    model = CLIPModel.from_pretrained(clip_folder)
    tokenizer, images = CLIPTokenizer.from_pretrained(clip_folder), CLIPImageProcessorPil.from_pretrained(clip_folder)
    scores = ClipScorer(clip_folder, "cpu")([photo(name) for name in PHOTOS], TEXTS)
    for name, text, score in zip(PHOTOS, TEXTS, scores, strict=True):
        tokens = tokenizer([text], truncation=True, max_length=60, return_tensors="pt")
        with torch.no_grad():
            output = model(**tokens, **images(photo(name), return_tensors="pt"))
        assert score == pytest.approx(float(output.logits_per_image / model.logit_scale.detach().exp()), abs=1e-6)
    assert max(scores) - min(scores) > 0.01


def test_samples_with_a_lower_score_are_filtered(clip_folder: Path) -> None:
    samples = [candidate(text, [file_of(photo(name))]) for name, text in zip(PHOTOS, TEXTS, strict=True)]
    samples.append(candidate("A sentence.", domain="text"))
    scores = ClipScorer(clip_folder, "cpu")([photo(name) for name in PHOTOS], TEXTS)
    # Batches change the last bits of a score: the limit is in the middle of the widest gap.
    low, high = max(pairwise(sorted(scores)), key=lambda pair: pair[1] - pair[0])
    limit = (low + high) / 2
    for batch_size in (2, 32):
        step = Relevance(weights=str(clip_folder), min=limit, batch_size=batch_size)
        step.check()
        verdicts = step.judge(samples)
        assert [bool(verdict) for verdict in verdicts] == [*(score < limit for score in scores), False]
        assert {verdict.reason for verdict in verdicts if verdict} == {"irrelevant_text"}


def brightness(images: list[Image.Image], texts: list[str]) -> list[float]:
    return [image.convert("L").resize((1, 1)).getpixel((0, 0)) / 255 for image in images]  # type: ignore[operator]


def test_a_user_can_give_a_scorer() -> None:
    black, white = (file_of(Image.new("RGB", (40, 40), colour)) for colour in ("black", "white"))
    step = Relevance(scorer=f"{__name__}:brightness", min=0.5, domains=["image_text", "interleaved"])
    step.check()
    assert step(candidate(images=[white])) is None
    verdict = step(candidate(images=[black]))
    assert verdict is not None
    assert verdict.reason == "irrelevant_text"
    assert step(candidate(images=[black, white, black], domain="interleaved")) is None  # the best of its images counts
    broken = step.judge([candidate(images=[b"broken"]), candidate(images=[white])])
    assert broken[0] is not None
    assert broken[0].reason == "unreadable_image"
    assert broken[1] is None


def test_unusable_scorers_are_errors() -> None:
    for step, message in (
        (Relevance(), "not a folder of a Hugging Face CLIP model"),
        (Relevance(scorer="nowhere:nothing"), "cannot be imported"),
        (Relevance(scorer="siglip"), "cannot be imported"),
    ):
        with pytest.raises(DataError, match=message):
            step.check()
