"""Copies of tensors from main memory to the device, for which the host does not wait."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: Any = None) -> Tensor:
    """Return a tensor on a device, by default this process's.

    A copy from pinned memory is only queued: the host continues. From other memory it would first wait until the device
    has done everything that was queued before. On a CPU this returns the tensor itself.
    """
    if tensor.is_cuda:
        return tensor
    return tensor.pin_memory().to(torch.cuda.current_device() if device is None else device, non_blocking=True)
