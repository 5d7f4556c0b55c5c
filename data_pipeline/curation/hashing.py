"""Hashes that are the same in every process and on every machine."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np


def hash64(*parts: str | int) -> int:
    """Return an integer below 2**64. Parts are kept apart: ("ab", "c") differs from ("a", "bc")."""
    joined = "\0".join(str(part) for part in parts)
    return int.from_bytes(blake2b(joined.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def uniform(*parts: str | int) -> float:
    """Return a number in [0, 1) that depends on the parts alone."""
    return hash64(*parts) / 2**64


def digest(*parts: bytes) -> bytes:
    """Return 16 bytes that identify the parts."""
    state = blake2b(digest_size=16)
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.digest()


def mixed(values: np.ndarray) -> np.ndarray:
    """Return one hash of n hashes, by FNV-1a's rule, which is one-to-one in each of them.

    Args:
        values: uint32 or uint64 [..., n].

    Returns:
        uint64 [...].
    """
    result = np.full(values.shape[:-1], 0xCBF29CE484222325, np.uint64)
    for index in range(values.shape[-1]):
        result = (result ^ values[..., index]) * np.uint64(0x100000001B3)
    return result
