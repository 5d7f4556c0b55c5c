"""Find tensors with values that are NaN or infinite."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def nonfinite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that have a NaN or an infinity.

    The sum of a tensor is not finite if one of its values is not, and costs a small part of looking at each value. It
    can also overflow, so that each value is looked at where it is not finite.
    """
    if not tensors:
        return []
    tensors = {name: tensor.float() if tensor.itemsize == 1 else tensor for name, tensor in tensors.items()}  # FP8
    sums = torch.stack([tensor.sum().float() for tensor in tensors.values()]).tolist()
    suspects = [name for name, total in zip(tensors, sums, strict=True) if not math.isfinite(total)]
    return [name for name in suspects if not torch.isfinite(tensors[name]).all()]
