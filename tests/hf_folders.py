"""Hugging Face folders of tiny models, written by transformers itself: the independent truth of conversion tests."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import nn

from model.config import GlmvConfig

PRESETS = ("tiny_moe", "tiny_dense")


def reference_model(preset: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """transformers' own model of a preset, with values that show every mistake: norms, biases and expert biases too
    are random, so no two tensors, heads or experts are alike."""
    content = GlmvConfig.from_preset(preset).to_hf()
    config = transformers.AutoConfig.for_model(**content)
    model = getattr(transformers, content["architectures"][0])(config)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict(keep_vars=True).items():
        with torch.no_grad():
            nn.init.normal_(tensor, std=0.05, generator=generator)
            if tensor.dim() == 1 and name.endswith("weight"):
                tensor += 1.0
    model = model.to(dtype).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = buffer.data.float()  # published in float32 whatever the rest is
    return model


def save_reference(preset: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Write `reference_model` as `save_pretrained` does."""
    reference_model(preset, seed, dtype).save_pretrained(folder)
    return folder
