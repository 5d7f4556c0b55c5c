"""The masks of `lora.dropout` by the formula in model.lora_dropout, computed in 64 bits, and PEFT made to use them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.reference import TestSample

ROWS_OF = {"model.visual.merger": "image tokens", "model.visual": "patches", "model": "tokens"}  # by module


def expected_mask(key: str, rows: Iterable[int], channels: Iterable[int], probability: float) -> np.ndarray:
    """Return what is kept, bool [rows, channels]; the key is "SEED/STEP/PACK/MODULE"."""
    k0, k1 = (int(word) for word in np.frombuffer(hashlib.sha256(key.encode()).digest()[:8], dtype="<u4"))
    row, channel = np.array([*rows], np.uint64)[:, None], np.array([*channels], np.uint64)[None]
    words = mixed(mixed(k0 + row) ^ mixed(channel // 2), mixed(k1 + row))
    bits = np.where(channel % 2 == 0, words % 2**16, words // 2**16).astype(np.int64)
    bits = np.where(bits >= 2**15, bits - 2**16, bits)
    return bits >= round(probability * 65536) - 32768


def mixed(x: np.ndarray, y: np.ndarray | int = 0) -> np.ndarray:
    x = x % 2**32
    x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
    x = (x + y) % 2**32
    x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
    return x ^ (x >> 16)


@dataclass
class SamplePlace:
    """Where the sample that runs now is in its pack."""

    run_and_pack: str = ""  # "SEED/STEP/PACK"
    begins: dict[str, int] | None = None  # place of its first token, patch and image token


class ForcedDropout(nn.Module):
    """Takes the place of PEFT's dropout of one module."""

    def __init__(self, module: str, probability: float, place: SamplePlace) -> None:
        super().__init__()
        self.module, self.probability, self.place = module, probability, place
        self.kind = next(kind for prefix, kind in ROWS_OF.items() if module.startswith(f"{prefix}."))

    def forward(self, x: Tensor) -> Tensor:
        """Drop from the input of one sample, [1, rows, channels] or [rows, channels]."""
        assert self.place.begins is not None
        begin = self.place.begins[self.kind]
        rows = range(begin, begin + x.shape[-2])
        key = f"{self.place.run_and_pack}/{self.module}"
        keeps = torch.from_numpy(expected_mask(key, rows, range(x.shape[-1]), self.probability))
        return x * keeps / (1 - round(self.probability * 65536) / 65536)


def force_dropout(adapted: Any, probability: float) -> SamplePlace:
    """Replace the dropout of a PEFT model; the returned place must be set before each sample."""
    place = SamplePlace()
    for name, module in adapted.named_modules():
        if hasattr(module, "lora_dropout"):
            forced = ForcedDropout(name.removeprefix("base_model.model."), probability, place)
            module.lora_dropout["default"] = forced
    return place


def placed(packs: Sequence[Sequence[TestSample]], seed: int, step: int, place: SamplePlace) -> Iterator[TestSample]:
    """Yield the samples of a step, one after the other, and set `place` before each."""
    for number, samples in enumerate(packs):
        begins = {"tokens": 0, "patches": 0, "image tokens": 0}
        for sample in samples:
            place.run_and_pack, place.begins = f"{seed}/{step}/{number}", begins
            yield sample
            patches = sum(h * w for h, w in sample.encoded.grids)
            begins = {
                "tokens": begins["tokens"] + -(-len(sample.encoded) // 8) * 8,  # segments are multiples of 8 tokens
                "patches": begins["patches"] + patches,
                "image tokens": begins["image tokens"] + patches // 4,
            }
