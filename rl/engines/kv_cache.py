"""Keys and values of rows that are drawn together: a column per token, prompts padded on the left.

prompt a b c, two rows    a b c | x x .       columns are the same in all rows,
prompt d e,   two rows    _ d e | x x .       those behind the bar are filled one by one
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

GROWTH = 64  # columns by which the capacity grows, at least


@dataclass
class PromptCache:
    """What the decoder calls `past_key_values` while it reads prompts of which nothing is held yet.

    Attributes:
        valid: bool [prompts, columns], False at padding.
        layers: Keys and values of each layer, [prompts, groups, columns, head_dim].
    """

    valid: Tensor
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Keep a layer's keys and values."""
        self.layers.append((keys, values))
        return keys, values


class KeyValueCache:
    """What the decoder calls `past_key_values` while tokens are drawn.

    Args:
        prompts: What was read, which is used up.
        copies: Rows that each prompt gets.

    Attributes:
        columns: In use, that of the token being computed included.
    """

    def __init__(self, prompts: Sequence[PromptCache], copies: Sequence[int]) -> None:
        self.columns = max(part.valid.size(1) for part in prompts)
        device = prompts[0].valid.device
        sizes = [part.valid.size(0) for part in prompts]
        repeats = torch.tensor(copies, device=device).split(sizes)
        self._layers: list[tuple[Tensor, Tensor]] = []
        for _ in range(len(prompts[0].layers)):
            keys, values = zip(*(part.layers.pop(0) for part in prompts), strict=True)
            self._layers.append((self._rows(keys, repeats), self._rows(values, repeats)))
        valid = [
            F.pad(part.valid, (self.columns - part.valid.size(1), 0)).repeat_interleave(times, 0)
            for part, times in zip(prompts, repeats, strict=True)
        ]
        self._valid = F.pad(torch.cat(valid), (0, GROWTH), value=True)
        self._is_padded = not bool(self._valid.all())

    def _rows(self, prompts: Sequence[Tensor], repeats: Sequence[Tensor]) -> Tensor:
        """Return the rows of a layer with room for tokens; padding is zero, because it is multiplied with zero."""
        return torch.cat(
            [
                F.pad(part, (0, 0, self.columns - part.size(2), GROWTH)).repeat_interleave(times, 0)
                for part, times in zip(prompts, repeats, strict=True)
            ]
        )

    def begin_token(self) -> Tensor | None:
        """Make room for one more token per row, and return the mask of its attention: bool [rows, 1, 1, columns]."""
        self.columns += 1
        if self.columns > self._valid.size(1):
            more = max(GROWTH, self.columns // 2)
            self._valid = F.pad(self._valid, (0, more), value=True)
            for number, (keys, values) in enumerate(self._layers):
                self._layers[number] = (F.pad(keys, (0, 0, 0, more)), F.pad(values, (0, 0, 0, more)))
        return self._valid[:, None, None, : self.columns] if self._is_padded else None

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Add the keys and values of one token per row, and return those of all its tokens."""
        for held, new in zip(self._layers[layer], (keys, values), strict=True):
            held[:, :, self.columns - 1] = new[:, :, 0]
        held_keys, held_values = self._layers[layer]
        return held_keys[:, :, : self.columns], held_values[:, :, : self.columns]

    def select(self, rows: Sequence[int]) -> None:
        """Keep some of the rows."""
        index = torch.tensor(rows, device=self._valid.device)
        self._valid = self._valid[index]
        for number, (keys, values) in enumerate(self._layers):
            self._layers[number] = (keys[index], values[index])
