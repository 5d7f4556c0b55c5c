"""What a pack costs: the measure by which the plan makes packs alike.

A segment of n tokens takes token * n + token_squared * n**2 floating-point operations of the decoder, a picture or
frame pair of n patches patch * n + patch_squared * n**2 of the vision tower. The coefficients are the model's: training
hands them in from its own cost model, so that this package knows nothing of models.

    PackCost(token=10, token_squared=1, patch=2, patch_squared=0).of(lengths=[3, 5], patches=[4, 0])  ->  [47., 75.]
"""

from __future__ import annotations

import zlib
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class PackCost:
    """Operations of a forward pass. Only their proportions matter: a backward pass costs twice as much of each."""

    token: int
    token_squared: int
    patch: int = 0
    patch_squared: int = 0

    def of(self, lengths: ArrayLike, patches: ArrayLike = 0, patches_squared: ArrayLike = 0) -> np.ndarray:
        """float64 [samples]. lengths: tokens of each; patches, patches_squared: sums over its pictures and frame pairs
        of their patches and of the squares of these."""
        tokens = np.asarray(lengths, dtype=np.float64)
        decoder = (self.token + self.token_squared * tokens) * tokens
        vision = self.patch * np.asarray(patches, dtype=np.float64)
        return decoder + vision + self.patch_squared * np.asarray(patches_squared, dtype=np.float64)

    @property
    def fingerprint(self) -> str:
        """8 hexadecimal digits. Packs depend on the coefficients, so a run must go on with those it began with."""
        return f"{zlib.crc32(repr(astuple(self)).encode()):08x}"
