"""Hugging Face folders with the published widths and few layers, written by the safetensors library."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from model.config import GlmvConfig
from model.weights.load import hf_shapes


def wide_config(preset: str, *, layers: int, vision_layers: int, vocab_size: int) -> GlmvConfig:
    """Return a published model with fewer layers and words."""
    config = GlmvConfig.from_preset(preset)
    return replace(
        config,
        decoder=replace(config.decoder, num_hidden_layers=layers, vocab_size=vocab_size),
        vision=replace(config.vision, depth=vision_layers),
    )


def save_wide(config: GlmvConfig, folder: Path, tensors_per_shard: int = 24) -> Path:
    """Write bfloat16 weights whose rows differ from each other, in shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(hf_shapes(config).items())
    shards = [names[start : start + tensors_per_shard] for start in range(0, len(names), tensors_per_shard)]
    values = torch.empty(2**24 + 7).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(0)).bfloat16()
    files = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for position, (name, shape) in enumerate(shard):
            count = torch.Size(shape).numel()
            first = (1_009 * position + number) % 1_000_003
            repeated = values if first + count <= values.numel() else values.repeat(-(-count // values.numel()) + 1)
            dtype = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
            tensors[name] = repeated[first : first + count].view(shape).to(dtype).clone()
            files[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "config.json").write_text(json.dumps({**config.to_hf(), "dtype": "bfloat16"}))
    return folder


def save_sparse(config: GlmvConfig, folder: Path) -> Path:
    """Write a folder of zeros that takes no space on disk: a header, and a file with a hole."""
    folder.mkdir(parents=True)
    header, position = {}, 0
    for name, shape in hf_shapes(config).items():
        is_bias = name.endswith("e_score_correction_bias")
        stop = position + torch.Size(shape).numel() * (4 if is_bias else 2)
        header[name] = {"dtype": "F32" if is_bias else "BF16", "shape": shape, "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    (folder / "config.json").write_text(json.dumps({**config.to_hf(), "dtype": "bfloat16"}))
    return folder
