"""Read the header of a safetensors file: which tensors it holds, and where.

The format is 8 bytes with the length of the header, the header (JSON), and the tensors without gaps. The library reads
files through a memory map, whose pages count as memory of the process; with the header, any rows can be read into a
buffer, also from an object store.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import prod
from typing import Any, NamedTuple

import torch

LENGTH_BYTES = 8
LARGEST_HEADER = 100_000_000  # the format's own limit

# The dtypes of the format, as far as torch has them.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


NAMES = {dtype: name for name, dtype in DTYPES.items()}


class HeaderError(ValueError):
    """The file is not a safetensors file, or is truncated."""


class StoredTensor(NamedTuple):
    """Where a tensor is in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first dimension; of the whole tensor if it has none."""
        return prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * self.dtype.itemsize


def read_header(read: Callable[[int, int], bytes], size: int) -> dict[str, StoredTensor]:
    """Return the tensors of a file by name, in the order in which they are stored.

    Args:
        read: Returns the bytes of the file from an offset on: (offset, count).
        size: Bytes of the file.

    Raises:
        HeaderError: The header is damaged, or does not describe a file of this size.
    """
    if size < LENGTH_BYTES:
        raise HeaderError(f"it has {size} bytes, fewer than a header")
    length = int.from_bytes(read(0, LENGTH_BYTES), "little")
    start = LENGTH_BYTES + length
    if length > LARGEST_HEADER or start > size:
        raise HeaderError(f"its header would have {length:,} bytes, and the file has {size:,}")
    try:
        content = json.loads(read(LENGTH_BYTES, length), object_pairs_hook=_without_repetition)
        if not isinstance(content, dict):
            raise TypeError
    except (ValueError, TypeError):
        raise HeaderError("its header is not a JSON object") from None
    content.pop("__metadata__", None)
    entries = (_stored(name, entry, start) for name, entry in content.items())
    found = sorted(entries, key=lambda entry: (entry[2].offset, entry[1]))
    position = start
    for name, stop, stored in found:
        if stored.offset != position or stop - stored.offset != stored.nbytes:
            raise HeaderError(f"the bytes of tensor {name} do not fit its shape and dtype, or the tensors beside it")
        position = stop
    if position != size:
        raise HeaderError(f"it has {size:,} bytes, and its header describes {position:,}")
    return {name: stored for name, _, stored in found}


def make_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, StoredTensor]]:
    """Return the bytes with which a file of tensors begins, and where each tensor is to be written in it.

    Dtypes of more bytes come first, so that every tensor is aligned, as the library writes them.

    Args:
        tensors: Dtype and shape of each tensor.
        metadata: What the header says beside "format".
    """
    content: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
        stop = position + prod(shape) * dtype.itemsize
        content[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(LENGTH_BYTES, "little") + text
    content.pop("__metadata__")
    return header, {name: _stored(name, entry, len(header))[2] for name, entry in content.items()}


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError
    return content


def _stored(name: str, entry: Any, start: int) -> tuple[str, int, StoredTensor]:
    try:
        dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, first, last]
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise TypeError
    except (KeyError, TypeError, ValueError):
        raise HeaderError(f"its header describes tensor {name} without dtype, shape and offsets") from None
    if dtype not in DTYPES:
        raise HeaderError(f"tensor {name} has the dtype {dtype}, which is not supported")
    return name, start + last, StoredTensor(DTYPES[dtype], tuple(shape), start + first)
