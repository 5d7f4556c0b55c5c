"""Open the weights of a folder, in whatever supported format they are.

    what the folder contains                         read as
    safetensors                                      plain tensors
    X_scale or X_scale_inv beside tensors in FP8     their products (`scales`)
    mlp.experts.gate_up_proj, down_proj              one tensor per expert (`experts`)

A folder may be several of these at once. Pickled weights are refused: unpickling runs code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from model.errors import WeightsError
from model.hf_config import CONFIG_FILE, QUANTIZATION_KEYS
from model.weights.files import INDEX, SINGLE
from model.weights.folder import SafetensorsFolder
from model.weights.formats.experts import fold_experts, separate_experts
from model.weights.formats.scales import DEFAULT_BLOCK, ScaledFolder
from model.weights.remote import has_file
from model.weights.source import WeightSource, some

# Files of weights that are pickled, in a folder of Hugging Face, of Meta's layout or of a trainer.
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# The dtypes that a weight may have.
PLAIN = (torch.float32, torch.float16, torch.bfloat16)


class OpenedFolder(NamedTuple):
    """The weights of a folder as those of a plain one."""

    source: WeightSource
    read_as: tuple[str, ...]  # a line for each format that was recognised, besides plain tensors


def open_folder(folder: Path, *, once: bool = False) -> OpenedFolder:
    """Return the weights of a Hugging Face folder under the names of its model.

    Args:
        folder: The folder, or the local copy of one behind a URL (`model.weights.remote`).
        once: Whether each tensor is read once, so that the page cache need not keep it.

    Raises:
        WeightsError: The folder has no weights that can be read, or they are damaged or in another format.
    """
    refuse_pickles(folder)
    stored = SafetensorsFolder(folder, once=once)
    fused = fold_experts(stored)
    source: WeightSource = stored
    read_as = []
    scaled = ScaledFolder(stored, _block(folder))
    if scaled.kinds or scaled.unused:
        source = scaled
    if scaled.kinds:
        of = {"tensor": "one scale per tensor", "channel": "one scale per row", "block": _block_name(scaled)}
        read_as.append("FP8, " + "; ".join(f"{of[kind]} ({count:,})" for kind, count in scaled.kinds.items()))
    if scaled.unused:
        read_as.append(f"scales of activations ({len(scaled.unused):,} tensors) are not used")
    if fused:
        source = separate_experts(stored, source)
        read_as.append(f"fused experts ({fused:,} tensors), as one tensor per expert")
    if other := [name for name in source.names() if source.dtype(name) not in PLAIN]:
        raise WeightsError(
            f"{stored.title}: tensors are stored as {str(source.dtype(other[0]))[6:]}: {some(other)}; quantised "
            "and integer weights are not supported, except FP8: use the float32, float16, bfloat16 or FP8 release of "
            "this model"
        )
    return OpenedFolder(source, tuple(read_as))


def refuse_pickles(folder: Path) -> None:
    """Refuse a folder whose weights are pickled only.

    Raises:
        WeightsError: It has pickled weights and no safetensors.
    """
    if has_file(folder, SINGLE) or (folder / INDEX).is_file():
        return
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if pickled:
        raise WeightsError(
            f"{folder} has no safetensors, and {some(pickled, 3)} would be unpickled, which runs whatever code a file "
            "names: convert it once where you trust it, on a machine without other data, with save_pretrained of "
            "transformers, which writes safetensors"
        )


def _block_name(scaled: ScaledFolder) -> str:
    return f"block scales {scaled.block[0]}x{scaled.block[1]}"


def _block(folder: Path) -> tuple[int, int]:
    """Return the size of a block from config.json, where it has one in any of the known places."""
    try:
        content: Any = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return DEFAULT_BLOCK  # GlmvConfig says what is wrong with it
    for section in (content, _object(content, "text_config")):
        for quantised in (_object(section, key) for key in QUANTIZATION_KEYS):
            groups = [_object(group, "weights") for group in _object(quantised, "config_groups").values()]
            for block in (quantised.get("weight_block_size"), *(group.get("block_structure") for group in groups)):
                if isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block):
                    return block[0], block[1]
    return DEFAULT_BLOCK


def _object(content: Any, key: str) -> dict[str, Any]:
    """Return an inner object of JSON; an empty one where there is none."""
    found = content.get(key) if isinstance(content, dict) else None
    return found if isinstance(found, dict) else {}
