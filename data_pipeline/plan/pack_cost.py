"""What a pack costs: the measure by which the plan balances packs.

A segment of n tokens takes token * n + token_squared * n**2 floating-point operations of the decoder. An image or
frame pair of n patches takes patch * n + patch_squared * n**2 of the vision tower. Training takes the coefficients from
the model's cost model and passes them in, so this package does not depend on the model.

    PackCost(token=10, token_squared=1, patch=2, patch_squared=0).of(lengths=[3, 5], patches=[4, 0])  ->  [47., 75.]
"""

from __future__ import annotations

import zlib
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class PackCost:
    """Operations of a forward pass. Only their ratios matter: a backward pass costs twice as much of each."""

    token: int  # operations per token
    token_squared: int  # per token squared of a segment
    patch: int = 0  # per patch
    patch_squared: int = 0  # per patch squared of an image or frame pair

    def of(self, lengths: ArrayLike, patches: ArrayLike = 0, patches_squared: ArrayLike = 0) -> np.ndarray:
        """Return float64 [samples], the operations of each sample.

        Args:
            lengths: Tokens of each sample.
            patches: The sum of patches over its images and frame pairs.
            patches_squared: The sum of their squares over its images and frame pairs.
        """
        tokens = np.asarray(lengths, dtype=np.float64)
        decoder = (self.token + self.token_squared * tokens) * tokens
        vision = self.patch * np.asarray(patches, dtype=np.float64)
        return decoder + vision + self.patch_squared * np.asarray(patches_squared, dtype=np.float64)

    @property
    def fingerprint(self) -> str:
        """8 hexadecimal digits. Packs depend on the coefficients, so a run must resume with the same ones."""
        return f"{zlib.crc32(repr(astuple(self)).encode()):08x}"
