"""What Transformer Engine's kernels of FP8 do, in plain torch, for one rank: quantise a tensor, pad experts' tokens.

The classes of quantised tensors and of quantisers are the real ones.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import transformer_engine.pytorch.quantization as quantization
from torch import Tensor
from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

COMPILED = sys.modules["transformer_engine_torch"]
LARGEST = 448.0  # of e4m3


@contextmanager
def blackwell() -> Iterator[None]:
    """Pretend that the GPU has the kernels of every recipe."""
    with (
        mock.patch.object(quantization, "get_device_compute_capability", return_value=(10, 0)),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(10, 0)),
        mock.patch.object(torch.version, "cuda", "13.0"),
    ):
        quantization.FP8GlobalStateManager.reset()
        yield
    quantization.FP8GlobalStateManager.reset()


def unfilled(quantizer: Any, tensor: Tensor) -> Any:
    return quantizer.make_empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


@contextmanager
def weights_in_fp8() -> Iterator[None]:
    """Let parameters be built in FP8, without values."""
    with ExitStack() as patches:
        patches.enter_context(blackwell())
        for kind in (Float8CurrentScalingQuantizer, Float8BlockQuantizer):
            patches.enter_context(mock.patch.object(kind, "quantize_impl", unfilled))
        yield


def quantize(tensor: Tensor, quantizer: Any, out: Any = None, _: Any = None) -> Any:
    """Scale a tensor by its largest value and round it to e4m3."""
    out = unfilled(quantizer, tensor) if out is None else out
    scale = LARGEST / tensor.detach().float().abs().max().clamp(min=1e-12)
    out._data.copy_((tensor.detach().float() * scale).to(torch.float8_e4m3fn).view(torch.uint8))
    out._scale_inv.copy_(scale.reciprocal())
    return out


def dequantize(tensor: Any, _: Any) -> Tensor:
    return (tensor._data.view(torch.float8_e4m3fn).float() * tensor._scale_inv).to(tensor.dtype)


@contextmanager
def tensorwise_by_definition() -> Iterator[None]:
    with ExitStack() as patches:
        patches.enter_context(blackwell())
        for name, definition in (("quantize", quantize), ("dequantize", dequantize)):
            patches.enter_context(mock.patch.object(COMPILED, name, definition, create=True))
        yield


def pad_rows(x: Tensor, out: Tensor, rows: Sequence[int], padded: Sequence[int]) -> None:
    """Copy groups of rows, each followed by rows of zeros."""
    out.zero_()
    for source, target in zip(x.split(list(rows)), out.split(list(padded)), strict=True):
        target[: len(source)] = source


def unpad_rows(x: Tensor, out: Tensor, padded: Sequence[int], rows: Sequence[int]) -> None:
    for source, target in zip(x.split(list(padded)), out.split(list(rows)), strict=True):
        target.copy_(source[: len(target)])


@contextmanager
def padding_by_definition() -> Iterator[None]:
    with (
        blackwell(),
        mock.patch.object(COMPILED, "fused_multi_row_padding", pad_rows, create=True),
        mock.patch.object(COMPILED, "fused_multi_row_unpadding", unpad_rows, create=True),
    ):
        yield
