"""How large images and videos may become, in tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PixelBudget:
    """The largest a picture and a clip may become, in tokens."""

    image_max_tokens: int = 6144
    video_max_tokens: int = 30000
