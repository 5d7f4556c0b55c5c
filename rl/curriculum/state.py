"""The curriculum's state as JSON, and back: what a checkpoint keeps of it.

    {"prompts": "9f...", "rows": "eJx...", "passes": "eJx...", "rollouts": ..., "kind_passes": ..., "kind_rollouts": ..}

Only prompts that have been rolled out are in it; what is known of the others is read again from the data. Arrays are
little-endian bytes, compressed by zlib, in base64: the same bits return. A
million prompts that have all been rolled out take a few megabytes.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from model.errors import CheckpointError

ROWS, NUMBERS = "<u4", "<f8"
LEVEL = 1  # of zlib: higher ones take several times as long for a tenth less


def pack(values: np.ndarray, dtype: str) -> str:
    """Return an array as text."""
    return base64.b64encode(zlib.compress(np.ascontiguousarray(values, dtype).tobytes(), LEVEL)).decode("ascii")


def unpack(state: Mapping[str, Any], name: str, dtype: str, largest: int) -> np.ndarray:
    """Return an array of a state, writable, in the machine's byte order.

    Args:
        state: the state.
        name: of the array in it.
        dtype: as it was packed.
        largest: how many numbers it can have. A text that stands for more is refused before it is unpacked.

    Raises:
        CheckpointError: it is absent or damaged.
    """
    most = largest * np.dtype(dtype).itemsize
    try:
        unpacking = zlib.decompressobj()
        content = unpacking.decompress(base64.b64decode(state[name], validate=True), most + 1)
        if not unpacking.eof:
            raise ValueError("it is cut off, or longer than it can be")
        values = np.frombuffer(content, dtype)
    except (KeyError, TypeError, ValueError, binascii.Error, zlib.error):
        raise damaged(name) from None
    return values.astype(values.dtype.newbyteorder("="))


def damaged(name: str) -> CheckpointError:
    """Return the error of a state of which one part is not what was saved."""
    return CheckpointError(f"the state of the curriculum in the checkpoint is damaged ({name}); use another step")
