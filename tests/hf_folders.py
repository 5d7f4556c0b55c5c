"""Complete Hugging Face folders of tiny models, written by transformers: the reference of conversion tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from demo.tokenizer import train_tokenizer
from tests.reference import small_config, transformers_model
from training.hf_files import preprocessor_config

VARIANTS = ("glm4v_moe", "glm4v")


def save_weights(variant: str, folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Write weights and config.json with transformers' `save_pretrained`."""
    model: Any = transformers_model(small_config(variant), seed).to(dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = buffer.data.float()  # published in float32 whatever the other tensors are
    model.save_pretrained(folder)
    return folder


def save_whole_folder(variant: str, folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Write weights, config.json, a tokenizer with its chat template, and the processor files."""
    save_weights(variant, folder, dtype=dtype, seed=seed)
    train_tokenizer(["What is in this image? A cat on a mat.", "0123456789"] * 8, folder)
    for name, kind, tokens in (
        ("preprocessor_config.json", "image", 6144),
        ("video_preprocessor_config.json", "video", 30000),
    ):
        (folder / name).write_text(json.dumps(preprocessor_config(kind, tokens, glm46v=variant == "glm46v")))
    return folder
