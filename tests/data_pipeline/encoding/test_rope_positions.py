"""3-D positions against transformers' Glm4vMoeModel.get_rope_index."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import Glm4vMoeConfig, Glm4vMoeModel

from data_pipeline.encoding.rope_positions import rope_positions
from data_pipeline.encoding.tokenizer import GlmTokenizer, tokenize
from data_pipeline.errors import DataError
from data_pipeline.media.video_sampling import VideoGeometry
from data_pipeline.sample import Image, Sample, Text, Token, Video

Glm4vProcessor = import_module("transformers.models.glm4v.processing_glm4v").Glm4vProcessor


@pytest.fixture(scope="module")
def model() -> Glm4vMoeModel:
    text = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    text |= {"intermediate_size": 8, "moe_intermediate_size": 8, "n_routed_experts": 2, "num_experts_per_tok": 1}
    text |= {"vocab_size": 64, "pad_token_id": 0}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 16, "intermediate_size": 8}
    with torch.device("meta"):
        return Glm4vMoeModel(Glm4vMoeConfig(text_config=text, vision_config=vision))


@pytest.mark.fast
def test_worked_example_of_the_module():
    is_image = np.array([0, 0, 1, 1, 1, 1, 1, 1, 0], dtype=bool)
    assert rope_positions(is_image, [(4, 6)]).tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]


@pytest.mark.fast
def test_positions_equal_transformers_on_random_samples(model: Glm4vMoeModel, tokenizer: GlmTokenizer):
    """Random orders of text, images and videos, often without one of them."""
    rng = np.random.default_rng(6)
    special = SimpleNamespace(
        image_token_id=tokenizer.image_id,
        video_start_id=tokenizer.special["<|begin_of_video|>"],
        video_end_id=tokenizer.special["<|end_of_video|>"],
    )

    def grid() -> tuple[int, int]:
        return int(rng.integers(1, 9)) * 2, int(rng.integers(1, 9)) * 2

    for _ in range(600):
        elements: list = [Token("[gMASK]"), Token("<sop>")]
        images, videos = [], []
        for kind in rng.integers(0, 4, rng.integers(0, 7)):
            if kind == 0:
                elements.append(Image())
                images.append(grid())
            elif kind == 1:
                height, width = grid()
                seconds = tuple(range(int(rng.integers(1, 5))))
                elements.append(Video())
                videos.append(
                    VideoGeometry(
                        tuple(range(2 * len(seconds))), seconds, tuple(map(str, seconds)), (height * 14, width * 14)
                    )
                )
            else:
                elements.append(Text("some text " * int(rng.integers(1, 4))))
        tokens = tokenize(Sample("interleaved", tuple(elements)), tokenizer, images, videos)
        kinds = Glm4vProcessor.create_mm_token_type_ids(special, [tokens.input_ids.tolist()])
        expected, _ = model.get_rope_index(
            torch.from_numpy(tokens.input_ids)[None],
            torch.tensor(kinds),
            image_grid_thw=torch.tensor([[1, *size] for size in images]) if images else None,
            video_grid_thw=torch.tensor([[len(v.seconds), *v.grid] for v in videos]) if videos else None,
        )
        positions = rope_positions(tokens.input_ids == tokenizer.image_id, tokens.grids)
        np.testing.assert_array_equal(positions, expected[:, 0])


@pytest.mark.fast
def test_image_tokens_that_do_not_match_the_grids_are_an_error():
    is_image = np.array([1, 1, 0, 1], dtype=bool)
    with pytest.raises(DataError, match=r"2 runs of <\|image\|> tokens but 3 images"):
        rope_positions(is_image, [(2, 4), (2, 2), (2, 2)])
    with pytest.raises(DataError, match=r"2 <\|image\|> tokens stand for an image of 2x2 tokens"):
        rope_positions(is_image, [(4, 4), (2, 2)])


@pytest.mark.fast
def test_text_without_images_counts_up_on_all_axes():
    assert rope_positions(np.zeros(4, dtype=bool), []).tolist() == [[0, 1, 2, 3]] * 3
