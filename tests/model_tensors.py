"""The tensors of a model that one process holds whole, by their Hugging Face names."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from model.glmv import GlmvModel
from model.weights.load import local_tensors
from model.weights.table import sizes, weights


@torch.no_grad()
def hf_tensors(model: GlmvModel) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor with its name, in the order of an export, in the dtype of its parameter."""
    held, size = dict(local_tensors(model)), sizes(model.glmv_config)
    for weight in weights(model.glmv_config):
        for part, (name, shape) in enumerate(weight.hf.items()):
            places = weight.transform.places(weight.hf_rows, size, part, 0, shape[0])
            yield name, torch.cat([held[weight.name][start:stop] for start, stop in places])
