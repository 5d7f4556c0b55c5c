"""Rotary angles: 3-D for the decoder, 2-D for the vision tower.

The decoder's frequencies are divided among the three position axes in contiguous sections (GLM-V: 8, 12 and 12 of 32
for time, height and width). The two published decoders then arrange them differently:

    half-split   (GLM-4.5V)  f0 f1 f2 ... f0 f1 f2 ...     pairs are (i, i + half)
    interleaved  (GLM-4.1V)  f0 f0 f1 f1 f2 f2 ...         pairs are (2i, 2i + 1)

megatron-core's own 3-D rope equals the first, crashes on the second, and is wrong for packs under context parallelism.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def rotary_frequencies(dim: int, theta: float) -> Tensor:
    """Return the inverse frequencies theta^(-2i/dim), float32 [dim / 2]."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=torch.cuda.current_device()) / dim)


class DecoderRope(nn.Module):
    """Angles of the decoder's rotary embedding, for the slot `rotary_pos_emb` of megatron-core's GPTModel.

    Source: transformers `Glm4vMoeTextRotaryEmbedding` (half-split) and `Glm4vTextRotaryEmbedding` (interleaved).
    """

    def __init__(self, rotary_dim: int, theta: float, interleaved: bool) -> None:
        super().__init__()
        self.inv_freq = rotary_frequencies(rotary_dim, theta)
        self.interleaved = interleaved

    def forward(self, position_ids: Tensor, mrope_section: list[int], cp_group: Any = None) -> Tensor:
        """Return the angles of a whole pack.

        Args:
            position_ids: int64 [3, 1, tokens], time, height and width.
            mrope_section: Frequencies of each axis.
            cp_group: Unused, megatron-core passes it.

        Returns:
            float32 [tokens, 1, 1, rotary_dim].
        """
        freqs = position_ids[..., None].float() * self.inv_freq  # [3, 1, tokens, rotary_dim / 2]
        sections = freqs.split(mrope_section, dim=-1)
        freqs = torch.cat([section[axis] for axis, section in enumerate(sections)], dim=-1)
        angles = freqs.repeat_interleave(2, dim=-1) if self.interleaved else torch.cat([freqs, freqs], dim=-1)
        return angles.transpose(0, 1).unsqueeze(2).contiguous()


def vision_angles(rows: Tensor, columns: Tensor, inv_freq: Tensor) -> Tensor:
    """Return the angles of the vision tower's 2-D rope: the first half of the pairs by row, the second by column.

    Args:
        rows: int64 [patches], row of each patch in its image.
        columns: int64 [patches], column of each patch in its image.
        inv_freq: float32 [head_dim / 4].

    Returns:
        float32 [patches, 1, 1, head_dim], half-split.
    """
    freqs = torch.cat([rows[:, None].float() * inv_freq, columns[:, None].float() * inv_freq], dim=-1)
    return torch.cat([freqs, freqs], dim=-1)[:, None, None, :]
