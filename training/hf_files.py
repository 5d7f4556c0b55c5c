"""The Hugging Face files that go with the weights: configuration, tokenizer, chat template, preprocessors.

They are gathered when a checkpoint is written and copied as they are into an export, so that transformers, vLLM and
SGLang preprocess as the model was trained.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from common.files import write_json, write_text
from data_pipeline.config import DataConfig
from data_pipeline.encoding.tokenizer import GlmTokenizer
from model.config import ConfigError, GlmvConfig
from model.image_constants import PIXEL_MEAN, PIXEL_STD

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json")  # fmt: skip
INHERITED = ("config.json", "generation_config.json")
SHORTEST_EDGE = 112 * 112  # pixels (of two frames) below which an image is enlarged
PIXELS_PER_TOKEN = 28 * 28 * 2  # of a picture, which counts as two frames


def check_tokenizer(model: GlmvConfig, tokenizer: GlmTokenizer) -> None:
    """The tokens that the model gives a meaning to must have the ids of its configuration.

    Raises:
        ConfigError: a token has another id, or the vocabulary is larger than the model's.
    """
    for name, expected in model.token_ids.items():
        if tokenizer.special[name] != expected:
            raise ConfigError(
                f"data.tokenizer {tokenizer.folder}: {name} has id {tokenizer.special[name]}, but the model's "
                f"configuration says {expected}; use the tokenizer that belongs to this model"
            )
    if tokenizer.vocab_size > model.decoder.vocab_size:
        raise ConfigError(
            f"data.tokenizer {tokenizer.folder} has {tokenizer.vocab_size} tokens, more than the model's vocab_size "
            f"{model.decoder.vocab_size}"
        )


def read_inherited(folder: Path | None) -> dict[str, str]:
    """What checkpoints of this run take over from where it started, by file name. Read once: the folder may go."""
    if folder is None:
        return {}
    return {name: (folder / name).read_text() for name in INHERITED if (folder / name).is_file()}


def write_hf_files(folder: Path, model: GlmvConfig, data: DataConfig, inherited: dict[str, str]) -> None:
    """Fill `folder`.

    Args:
        model: what is trained.
        data: names the tokenizer's folder and the pixel budgets.
        inherited: files to take as they are; the others are made.
    """
    text = model.decoder
    made = {
        "config.json": model.to_hf(),
        "generation_config.json": {"eos_token_id": list(text.eos_token_id), "pad_token_id": text.pad_token_id},
        "preprocessor_config.json": preprocessor_config("image", data.image_max_tokens),
        "video_preprocessor_config.json": preprocessor_config("video", data.video_max_tokens),
    }
    for name, content in made.items():
        write_json(folder / name, content)
    for name, file_text in inherited.items():
        write_text(folder / name, file_text)
    for name in TOKENIZER_FILES:
        if (file := Path(data.tokenizer) / name).is_file():
            shutil.copyfile(file, folder / name)


def preprocessor_config(kind: str, max_tokens: int) -> dict[str, Any]:
    """Content of (video_)preprocessor_config.json: transformers' keys, with a budget of so many tokens."""
    common = {
        "size": {"shortest_edge": SHORTEST_EDGE, "longest_edge": max_tokens * PIXELS_PER_TOKEN},
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 3,
        "image_mean": list(PIXEL_MEAN),
        "image_std": list(PIXEL_STD),
        "processor_class": "Glm4vProcessor",
    }
    if kind == "image":
        return {**common, "image_processor_type": "Glm4vImageProcessor"}
    return {**common, "video_processor_type": "Glm4vVideoProcessor", "fps": 2, "do_sample_frames": True,
            "max_duration": 300}  # fmt: skip
