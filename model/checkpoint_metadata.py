"""Read the one pickled file of a checkpoint, `.metadata`, without running code from it.

torch_dist unpickles `.metadata`, and whatever that file declares to be an object. A checkpoint that a user brings is
therefore first read with an unpickler that knows only classes of torch.distributed.checkpoint; and only tensors are
accepted.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from common.storage import StorageError, patiently
from model.errors import CheckpointError

SAFE_GLOBALS = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "SavePlan",
        "WriteItem",
        "WriteItemType",
        "TensorWriteData",
        "BytesIOWriteData",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {"Size", "device", "float32", "float64", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
}

EMBEDDING = "language_model.embedding.word_embeddings.weight"
ADAPTERS = "lora."  # in front of their keys


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # Names are compared as they are written: a dotted one could lead out of its module.
        if name in SAFE_GLOBALS.get(module, ()):
            return super().find_class(module, name)
        raise CheckpointError(
            f"names {module}.{name}, which no checkpoint needs; it was not read. "
            "Do not use this checkpoint unless you know who wrote it"
        )


def read_metadata(state: Path) -> Metadata:
    """Return where each tensor of a checkpoint is.

    Raises:
        CheckpointError: it is missing, damaged, or names a class that is not torch.distributed.checkpoint's own.
        StorageError: it cannot be read because storage fails.
    """
    file = state / ".metadata"
    if not patiently(file.is_file, file):
        raise CheckpointError(f"{state.parent} is incomplete: {file} is missing; use another step")
    try:
        metadata: Any = _MetadataUnpickler(io.BytesIO(patiently(file.read_bytes, file))).load()
        if not isinstance(metadata, Metadata):
            raise TypeError(f"it holds a {type(metadata).__name__}")
    except StorageError:
        raise
    except CheckpointError as error:
        raise CheckpointError(f"{file} {error}") from None
    except Exception as error:  # a damaged pickle fails in many ways
        reason = (str(error) or type(error).__name__).splitlines()[0][:300]
        raise CheckpointError(f"{file} is damaged ({reason}); use another step") from error
    return metadata


def is_of_earlier_version(state: Path) -> bool:
    """Return whether tensors were written by torch's writer, as in earlier versions, which wrote no manifest.

    It gives each save a random name; ours (model.checkpoint_writer) gives none.

    Raises:
        CheckpointError, StorageError: as `check_metadata`.
    """
    meta = read_metadata(state).storage_meta
    return meta is not None and meta.save_id is not None


def check_metadata(state: Path) -> None:
    """Check `.metadata` in a checkpoint's folder of tensors, before megatron-core unpickles it.

    Raises:
        CheckpointError: it is missing, damaged, or names a class that is not torch.distributed.checkpoint's own.
        StorageError: it cannot be read because storage fails.
    """
    kinds = read_metadata(state).state_dict_metadata.items()
    if objects := [key for key, kind in kinds if not isinstance(kind, TensorStorageMetadata)]:
        raise CheckpointError(
            f"{state.parent} holds pickled objects ({', '.join(objects[:3])}); they were not read. Checkpoints of this "
            "program hold only tensors"
        )


def stored_dtype(state: Path) -> torch.dtype:
    """Return the dtype of the parameters, or adapters, in a checkpoint's folder of tensors, float32 or bfloat16.

    Raises:
        CheckpointError: it holds another model, or is not safe to read.
    """
    check_metadata(state)
    stored = read_metadata(state).state_dict_metadata
    adapters = (tensor for key, tensor in stored.items() if key.startswith(ADAPTERS))
    weight = stored.get(EMBEDDING) or next(adapters, None)
    if not isinstance(weight, TensorStorageMetadata) or weight.properties.dtype not in (torch.float32, torch.bfloat16):
        raise CheckpointError(f"{state.parent} does not hold the weights of a GLM-V model")
    return weight.properties.dtype
