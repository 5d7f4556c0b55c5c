"""What modules built on fake ranks hold. A fake process group needs a process that has no other."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from model.backend import select_backend
from model.lora import add_adapters
from model.lora_config import LoraConfig
from model.parts import part_of
from model.rank_sizes import Group
from tests.te.fake_ranks import Rank, built


def parameters(preset: str, rank: Rank, chunks: list[dict[str, Any]]) -> Counter[Group]:
    """Count the parameters of a rank; `chunks` are the options of GlmvModel for each of its virtual stages."""
    held: Counter[Group] = Counter()
    for options in chunks:
        with built(preset, rank, select_backend("torch", torch.float32), torch.float32, **options) as chunk:
            for name, parameter in chunk.named_parameters():
                held[Group(part_of(name), ".experts." in name)] += parameter.numel()
    return held


def adapters(preset: str, rank: Rank, lora: LoraConfig) -> Counter[Group]:
    """Count the parameters of a rank's adapters."""
    held: Counter[Group] = Counter()
    with built(preset, rank, select_backend("torch", torch.float32), torch.float32) as chunk:
        add_adapters(chunk, lora)
        for name, parameter in chunk.named_parameters():
            if ".lora." in name:
                held[Group(part_of(name), ".experts." in name)] += parameter.numel()
    return held
