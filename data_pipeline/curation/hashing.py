"""Hashes that are the same in every process and on every machine."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np


def hash64(*parts: str | int) -> int:
    """An integer below 2**64 of these parts, which are kept apart: ("ab", "c") is not ("a", "bc")."""
    joined = "\0".join(str(part) for part in parts)
    return int.from_bytes(blake2b(joined.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def uniform(*parts: str | int) -> float:
    """A number in [0, 1) drawn by hashing: the same for the same parts, whatever came before."""
    return hash64(*parts) / 2**64


def digest(*parts: bytes) -> bytes:
    """16 bytes that tell contents apart."""
    state = blake2b(digest_size=16)
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.digest()


def mixed(values: np.ndarray) -> np.ndarray:
    """uint32 or uint64 [..., n] -> uint64 [...]: one hash of n hashes, by FNV-1a's rule. It is one-to-one in each of
    them, so it tells runs of good hashes apart as well as 64 bits can."""
    result = np.full(values.shape[:-1], 0xCBF29CE484222325, np.uint64)
    for index in range(values.shape[-1]):
        result = (result ^ values[..., index]) * np.uint64(0x100000001B3)
    return result
