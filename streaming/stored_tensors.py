"""Find the values of a tensor inside a file of a checkpoint.

torch.save writes a tensor as a zip archive: a pickle that describes it, and its values as they are in memory. The
values are read where they are, any rows of them; the pickle is read for dtype, shape and strides alone.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from typing import Any, NamedTuple

import torch

from model.weights.files import WeightFile, read_bytes

LARGEST_PICKLE = 2**16
LOCAL_HEADER = 30  # bytes before the name of a zip record
STORAGES = {
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
}


class StoredTensorError(ValueError):
    """The bytes are not a tensor as torch.save writes it."""


class _Described(NamedTuple):
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def find_values(file: WeightFile, offset: int, length: int, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Return where in the file the values of a tensor begin; they are contiguous.

    Args:
        file: A file of a checkpoint.
        offset: Where the tensor's archive begins.
        length: Bytes of the archive.
        dtype: Its dtype, according to the checkpoint's metadata.
        shape: Its shape, likewise.

    Raises:
        StoredTensorError: The archive is damaged, or holds another tensor.
    """
    try:
        with zipfile.ZipFile(_Window(file, offset, length)) as archive:
            records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        description, values = records["data.pkl"], records["data/0"]
        if description.file_size > LARGEST_PICKLE:
            raise ValueError(f"its description has {description.file_size:,} bytes")
        # The library would compare CRC-32, which torch.save need not have written; the manifest has checksums.
        pickled = read_bytes(file, offset + _content(file, offset, description), description.file_size)
        described = _describe(pickled)
        start = _content(file, offset, values)
    except (zipfile.BadZipFile, KeyError, EOFError, ValueError, OverflowError, pickle.UnpicklingError) as error:
        raise StoredTensorError(f"it is not a tensor as torch.save writes it ({error})") from None
    expected = _Described(dtype, 0, shape, torch.empty(shape, device="meta").stride())
    count = torch.Size(shape).numel() * dtype.itemsize
    if described != expected or values.file_size != count:
        raise StoredTensorError(f"it is {described}, and its metadata says {expected}")
    if start + count > length:
        raise StoredTensorError("its values end behind it")
    return offset + start


def _content(file: WeightFile, offset: int, info: zipfile.ZipInfo) -> int:
    """Return where the content of a record begins in its archive."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} is compressed")
    header = read_bytes(file, offset + info.header_offset, LOCAL_HEADER)
    return info.header_offset + LOCAL_HEADER + sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))


def _describe(pickled: bytes) -> _Described:
    described = _DescriptionUnpickler(io.BytesIO(pickled)).load()
    if not isinstance(described, _Described):
        raise ValueError("it is no tensor")
    return described


def _rebuild(dtype: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Described:
    return _Described(dtype, offset, tuple(shape), tuple(strides))


class _DescriptionUnpickler(pickle.Unpickler):
    """Reads what a tensor is, and makes no object of torch."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a tensor")

    def persistent_load(self, pid: Any) -> Any:
        _, dtype, key, *_ = pid
        if key != "0":
            raise pickle.UnpicklingError("it has several storages")
        return dtype


class _Window(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: WeightFile, offset: int, length: int) -> None:
        self.file, self.offset, self.length, self.position = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        if self.position < 0:
            raise ValueError("seek before the beginning")
        return self.position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self.length - self.position)
        count = left if size is None or size < 0 else min(size, left)
        data = read_bytes(self.file, self.offset + self.position, count)
        self.position += count
        return data
