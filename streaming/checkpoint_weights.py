"""The weights of a checkpoint as a source of tensors by their Hugging Face names."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from model.config import GlmvConfig
from model.weights.table import Weight, sizes, weights
from streaming.names import place_of
from streaming.stored_parameters import StoredParameters, Wanted


class CheckpointWeights:
    """The weights of a step folder by their Hugging Face names, saved at any layout.

    Raises:
        CheckpointError: It is damaged, of another model, or not safe to read.
    """

    def __init__(self, folder: Path, config: GlmvConfig) -> None:
        self._size = sizes(config)
        self._weight: dict[str, tuple[Weight, int]] = {}
        table = list(weights(config))
        for weight in table:
            self._weight |= {name: (weight, part) for part, name in enumerate(weight.hf)}
        wanted = {weight.name: Wanted(weight.shape, place_of(weight.name, config)) for weight in table}
        self._stored = StoredParameters(folder, wanted, "its config.json")
        self.archives = self._stored.archives

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._weight)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor."""
        return self._weight[name][0].hf[name]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of one tensor."""
        return self._stored.dtype(self._weight[name][0].name)

    def where(self, name: str) -> str:
        """Return the files of one tensor."""
        return self._stored.where(self._weight[name][0].name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows of one tensor.

        Raises:
            CheckpointError: a value is NaN or infinite, or a file is damaged.
        """
        weight, part = self._weight[name]
        places = weight.transform.places(weight.hf_rows, self._size, part, start, stop)
        pieces = [self._stored.rows(weight.name, *place) for place in places]
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]
