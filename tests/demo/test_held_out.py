"""The demo's evaluation: swapped images, packs, and answers that are counted as right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.encoding.tokenizer import GlmTokenizer
from data_pipeline.media.pixel_budget import PixelBudget
from demo.held_out import ask, encode, packs, read_samples, share_answered, with_next_images
from tests.hf_folders import save_whole_folder
from tools.exported import Exported


def test_only_the_images_are_swapped(small_shards: Path, tokenizer_folder: Path) -> None:
    tokenizer, budget = GlmTokenizer(tokenizer_folder), PixelBudget(64, 64)
    samples = read_samples(small_shards / "chat")[:4]
    swapped = with_next_images(samples)
    assert [sample.record for sample in swapped] == [sample.record for sample in samples]
    assert [sample.images for sample in swapped] == [sample.images for sample in (*samples[1:], samples[0])]
    for own, other in zip(encode(samples, tokenizer, budget), encode(swapped, tokenizer, budget), strict=True):
        assert np.array_equal(own.input_ids[own.loss], other.input_ids[other.loss])
        assert not torch.equal(own.patches, other.patches)


def test_packs_hold_every_sample_once(small_shards: Path, tokenizer_folder: Path) -> None:
    samples = encode(read_samples(small_shards / "captions"), GlmTokenizer(tokenizer_folder), PixelBudget(64, 64))
    made = list(packs(samples, 256))
    assert len(made) > 1
    assert sum(int(pack.loss_mask.sum()) for pack in made) == sum(int(sample.loss[1:].sum()) for sample in samples)


@pytest.mark.fast
def test_an_answer_is_right_when_it_is_the_recorded_one(small_shards: Path, tmp_path: Path) -> None:
    exported = Exported.load(save_whole_folder("glm4v_moe", tmp_path / "hf", seed=1), dtype=torch.float32)
    samples = read_samples(small_shards / "chat")[:4]
    for row, sample in enumerate(samples[:3]):  # record what the model says to three of four
        prompt = sample.record["messages"][0]["content"]
        answer = ask(exported, prompt, sample.images[0], thinking=False)
        assert answer
        messages = [sample.record["messages"][0], {"role": "assistant", "content": answer}]
        samples[row] = replace(sample, record={**sample.record, "messages": messages})
    assert share_answered(exported, samples) == 0.75
