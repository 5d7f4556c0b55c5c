"""Keys and values of responses that are drawn together. Those of a prompt are held once for all its rows.

    prompt a b c    rows x x .  and  y y .      prompts are padded on the left,
    prompt _ d e    rows z z .  and  w w .      columns of the rows are filled one by one

A row attends to its prompt and to itself. The queries of a prompt's rows meet its keys in one product. If prompts have
unequal numbers of rows, because some responses have ended, they stand in a grid with empty places:

    slots 0 1, 2 _ :    prompt 0 has two rows left, prompt 1 has one
"""

from __future__ import annotations

from collections import Counter
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


@dataclass
class Layer:
    """What is held of one layer.

    Attributes:
        prompts: Keys and values of the prompts, [prompts, groups, columns, head_dim]; zeros at padding.
        rows: Keys and values of the responses, [rows, groups, capacity, head_dim].
    """

    prompts: tuple[Tensor, Tensor]
    rows: tuple[Tensor, Tensor]


class KeyValueCache:
    """What the decoder calls `past_key_values` while tokens are drawn.

    Args:
        prompts: What was read, which is used up.
        copies: Rows of each prompt.
    """

    def __init__(self, prompts: Sequence[PromptCache], copies: Sequence[int]) -> None:
        length = max(part.valid.size(1) for part in prompts)
        valid = torch.cat([F.pad(part.valid, (length - part.valid.size(1), 0)) for part in prompts])
        self._bias = torch.where(valid, 0.0, -torch.inf)[:, None, None]  # [prompts, 1, 1, columns]
        self._layers: list[Layer] = []
        for _ in range(len(prompts[0].layers)):
            both = zip(*(part.layers.pop(0) for part in prompts), strict=True)
            keys, values = (
                torch.cat([F.pad(part, (0, 0, length - part.size(2), 0)) for part in parts]) for parts in both
            )
            room = keys.new_zeros(sum(copies), keys.size(1), GROWTH, keys.size(3))
            self._layers.append(Layer((keys, values), (room, room.clone())))
        self._columns = 0  # of the rows; that of the token being read included
        self._place([prompt for prompt, count in enumerate(copies) for _ in range(count)])

    def _place(self, prompt_of_row: list[int]) -> None:
        """Give every row a place in the grid: [prompts, most rows of a prompt]."""
        self._prompt_of_row = prompt_of_row
        counts = Counter(prompt_of_row)
        self._most = max(counts.values())
        self._slots: Tensor | None = None
        if set(counts.values()) != {self._most}:
            done: Counter[int] = Counter()
            slots = []
            for prompt in prompt_of_row:
                slots.append(prompt * self._most + done[prompt])
                done[prompt] += 1
            self._slots = torch.tensor(slots, device=self._bias.device)

    def begin_token(self) -> None:
        """Make room for one more token per row."""
        self._columns += 1
        if self._columns > self._layers[0].rows[0].size(2):
            more = max(GROWTH, self._columns // 2)
            for layer in self._layers:
                layer.rows = (F.pad(layer.rows[0], (0, 0, 0, more)), F.pad(layer.rows[1], (0, 0, 0, more)))

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[RowsOfLayer, None]:
        """Add the keys and values of one token per row. The decoder gives what this returns to its attention."""
        for held, new in zip(self._layers[layer].rows, (keys, values), strict=True):
            held[:, :, self._columns - 1] = new[:, :, 0]
        return RowsOfLayer(self, self._layers[layer]), None

    def select(self, rows: Sequence[int]) -> None:
        """Keep some of the rows, and the prompts that they belong to."""
        index = torch.tensor(rows, device=self._bias.device)
        left = [self._prompt_of_row[row] for row in rows]
        kept = list(dict.fromkeys(left))
        prompts = torch.tensor(kept, device=self._bias.device)
        self._bias = self._bias[prompts]
        for layer in self._layers:
            layer.rows = (layer.rows[0][index], layer.rows[1][index])
            layer.prompts = (layer.prompts[0][prompts], layer.prompts[1][prompts])
        numbers = {prompt: number for number, prompt in enumerate(kept)}
        self._place([numbers[prompt] for prompt in left])

    # --- attention ----------------------------------------------------------------------------------------------------

    def attend(self, layer: Layer, query: Tensor, scaling: float) -> Tensor:
        """Return the attention of one token per row, in float32 inside: [rows, 1, heads, head_dim].

        Args:
            layer: What is held of the layer.
            query: [rows, heads, 1, head_dim].
            scaling: Of the products.
        """
        rows, heads, _, dim = query.shape
        prompt_keys, prompt_values = layer.prompts
        keys, values = (held[:, :, : self._columns].float() for held in layer.rows)
        queries = (query.float() * scaling).reshape(rows, keys.size(1), -1, dim)  # the heads that share a group's keys
        to_prompt = self._to_grid(queries) @ prompt_keys.float().transpose(2, 3) + self._bias
        scores = torch.cat([self._from_grid(to_prompt), queries @ keys.transpose(2, 3)], dim=-1)
        length = prompt_keys.size(2)
        of_prompt, own = scores.softmax(-1).split([length, self._columns], dim=-1)
        output = self._from_grid(self._to_grid(of_prompt) @ prompt_values.float()) + own @ values
        return output.to(query.dtype).reshape(rows, 1, heads, dim)

    def _to_grid(self, of_rows: Tensor) -> Tensor:
        """Bring [rows, groups, heads per group, n] into the order of prompts: [prompts, groups, rows * heads, n]."""
        grid = of_rows
        if self._slots is not None:
            grid = of_rows.new_zeros(self._bias.size(0) * self._most, *of_rows.shape[1:])
            grid[self._slots] = of_rows
        return grid.unflatten(0, (-1, self._most)).transpose(1, 2).flatten(2, 3)

    def _from_grid(self, of_prompts: Tensor) -> Tensor:
        """Do the reverse of `_to_grid`."""
        rows = of_prompts.unflatten(2, (self._most, -1)).transpose(1, 2).flatten(0, 1)
        return rows if self._slots is None else rows[self._slots]


@dataclass(frozen=True)
class RowsOfLayer:
    """Stands for the keys in the decoder's attention while tokens are drawn."""

    cache: KeyValueCache
    layer: Layer

    def attend(self, query: Tensor, scaling: float) -> Tensor:
        """As `KeyValueCache.attend`."""
        return self.cache.attend(self.layer, query, scaling)
