"""The Hugging Face files that go with the weights: configuration, tokenizer, chat template, preprocessors.

They are gathered when a checkpoint is written and copied as they are into an export, so that transformers, vLLM and
SGLang preprocess as the model was trained.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from data_pipeline.config import DataConfig
from data_pipeline.tokens import GlmTokenizer
from model.checkpoint import COMPANIONS
from model.config import ConfigError, GlmvConfig
from model.vision import PIXEL_MEAN, PIXEL_STD

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json")  # fmt: skip
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


def write_companions(folder: Path, model: GlmvConfig, data: DataConfig, source: Path | None) -> None:
    """Fill `folder`.

    Args:
        model: what is trained; its config.json is written where `source` brings none.
        data: names the tokenizer's folder and the pixel budgets.
        source: the Hugging Face folder or the checkpoint that training started from, if any.
    """
    write_json(folder / "config.json", model.to_hf())
    if source is not None:
        inherited = source / COMPANIONS if (source / COMPANIONS).is_dir() else source
        for name in ("config.json", "generation_config.json"):
            if (inherited / name).is_file():
                shutil.copyfile(inherited / name, folder / name)
    if not (folder / "generation_config.json").is_file():
        text = model.decoder
        write_json(
            folder / "generation_config.json",
            {"eos_token_id": list(text.eos_token_id), "pad_token_id": text.pad_token_id},
        )
    for name in TOKENIZER_FILES:
        if (file := Path(data.tokenizer) / name).is_file():
            shutil.copyfile(file, folder / name)
    for name, kind, tokens in (
        ("preprocessor_config.json", "image", data.image_max_tokens),
        ("video_preprocessor_config.json", "video", data.video_max_tokens),
    ):
        write_json(folder / name, preprocessor_config(kind, tokens))


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


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
