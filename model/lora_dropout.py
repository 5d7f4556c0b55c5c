"""Dropout before adapters. Its masks depend on what is dropped, not on where or when it is computed.

With `lora.dropout=p` an adapter computes B (A dropout(x)), as PEFT does, and each adapter has its own mask. Whether the
value x[row, channel] is kept is a function of the run's seed, the step, the pack's number in it, the module's name in
transformers' model, the row and the channel. So it is the same in every layout, in recomputed layers and in a resumed
run. Rows are counted in the whole pack: tokens in the decoder, patches in the vision tower, image tokens in the
adapter after it. In unsigned 32-bit arithmetic, where p in 65,536ths is `threshold`:

    k0, k1   the first 8 bytes of SHA-256("SEED/STEP/PACK/MODULE"), little endian
    word     mix(mix(k0 + row) ^ mix(channel // 2), mix(k1 + row))
    bits     the lower 16 bits of the word for even channels, the upper for odd ones, as a signed number
    kept     where bits >= threshold - 32,768; what is kept is multiplied by 65,536 / (65,536 - threshold)

    mix(x, y = 0):  x ^= x >> 16;  x *= 0x7FEB352D;  x += y;  x ^= x >> 15;  x *= 0x846CA68B;  x ^= x >> 16

The constants are those of Wellons' `lowbias32`. Masks are not kept: the backward pass computes them again.

megatron-core recomputes the layers of one pack between the forward passes of others. A layer therefore learns its rows
from its argument `packed_seq_params`, which a recomputed layer gets again.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.lora_config import DROPOUT_STEPS, dropout_threshold


class PackNumber(NamedTuple):
    """Which pack of a run this is."""

    step: int
    pack: int  # its number in the global batch of the step, from 0


class PackRows(NamedTuple):
    """The rows that the layers of a pack work on."""

    pack: PackNumber
    rows: Tensor  # int32 [rows of this rank], their places in the whole pack


class AdapterDropout:
    """The dropout that the adapters of one chunk of a model share.

    Args:
        probability: How likely a value is dropped.
        seed: Seed of the run.

    Attributes:
        current: What the layers that run now work on; None: nothing is dropped.
    """

    def __init__(self, probability: float = 0.0, seed: int = 0) -> None:
        self.threshold, self.seed = dropout_threshold(probability), seed
        self.current: PackRows | None = None
        self._pack: PackNumber | None = None

    def begin(self, pack: PackNumber | None) -> None:
        """Begin a forward pass; None: of a model that is evaluated."""
        self._pack = pack if self.threshold else None
        self.current = None

    def work_on(self, rows: Tensor) -> None:
        """Note which rows of the pack the next modules work on: integers [rows], in main memory."""
        if self._pack is not None:
            self.current = PackRows(self._pack, rows.int().to(torch.cuda.current_device(), non_blocking=True))

    def follow(self, block: nn.Module) -> None:
        """Hand the rows to each layer of a transformer block, recomputed layers included."""
        block.register_forward_pre_hook(self._send, with_kwargs=True)
        layers: Any = block.layers
        for layer in layers:
            layer.register_forward_pre_hook(self._receive, with_kwargs=True)

    def _send(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs["packed_seq_params"].adapter_rows = self.current

    def _receive(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.current = kwargs["packed_seq_params"].adapter_rows

    def mask(self, module: str, channels: range, part: int = 0, parts: int = 1) -> DropoutMask | None:
        """Return the mask of a module's input; None: nothing is dropped.

        Args:
            module: Its name in transformers' model.
            channels: Those of the whole input that this rank has.
            part: Which part of the rows this rank has.
            parts: Number of equal parts in which they are split.
        """
        if self.current is None:
            return None
        (step, pack), rows = self.current
        digest = hashlib.sha256(f"{self.seed}/{step}/{pack}/{module}".encode()).digest()
        keys = [int.from_bytes(digest[at : at + 4], "little", signed=True) for at in (0, 4)]
        return DropoutMask(rows.chunk(parts)[part], channels, keys[0], keys[1], self.threshold)


@dataclass(frozen=True)
class DropoutMask:
    """The mask of a part of a module's input."""

    rows: Tensor  # int32 [rows], places in the whole pack
    channels: range  # of the whole input
    key0: int  # signed, 32 bits
    key1: int
    threshold: int

    def keeps(self) -> Tensor:
        """Return what is kept, bool [rows, channels]."""
        first = self.channels.start // 2
        pairs = torch.arange(first, (self.channels.stop + 1) // 2, dtype=torch.int32, device=self.rows.device)
        words = mix(self.rows + self.key0)[:, None] ^ mix(pairs)
        words = mix(words, mix(self.rows + self.key1)[:, None])
        begin = self.channels.start - 2 * first
        bits = words.view(torch.int16)[:, begin : begin + len(self.channels)]
        return bits >= self.threshold - DROPOUT_STEPS // 2

    @property
    def scale(self) -> float:
        """What kept values are multiplied by, so that the mean stays."""
        return DROPOUT_STEPS / (DROPOUT_STEPS - self.threshold)


def mix(x: Tensor, y: Tensor | int = 0) -> Tensor:
    """Mix the bits of an int32 tensor, which it overwrites, with those of another. Products and sums wrap around."""
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= 0x7FEB352D
    x += y
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= 0x846CA68B - (1 << 32)
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


class _DroppedLinear(torch.autograd.Function):
    """The product of a matrix and an input of which values are dropped. Keeps the input, but no mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, mask: DropoutMask) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.mask = mask
        return F.linear(_drop(x, mask.keeps(), mask.scale), weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x, weight), keeps, scale = ctx.saved_tensors, ctx.mask.keeps(), ctx.mask.scale
        of_x = _drop(gradient @ weight, keeps, scale) if ctx.needs_input_grad[0] else None
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = gradient.flatten(0, -2).T @ _drop(x, keeps, scale).flatten(0, -2)
        return of_x, of_weight, None


def _drop(x: Tensor, keeps: Tensor, scale: float) -> Tensor:
    """Return what is left of [rows, ..., channels]."""
    return (x * keeps.view(x.shape)).mul_(scale)


def dropped_linear(x: Tensor, weight: Tensor, mask: DropoutMask | None) -> Tensor:
    """Return weight @ dropout(x): x is [rows, ..., in], the weight [out, in]."""
    return F.linear(x, weight) if mask is None else _DroppedLinear.apply(x, weight, mask)
