"""AIMv2-Huge as the vision tower of a GLM-V model, in Apple's names or those of transformers' Aimv2VisionModel.

    Apple                              transformers                            model.visual.
    preprocessor.patchifier.proj       embeddings.patch_embed                  patch_embed.proj
    preprocessor.patchifier.norm       embeddings.rms_norm                     post_conv_layernorm
    preprocessor.pos_embed             embeddings.position_embedding.weight    embeddings.position_embedding.weight
    trunk.blocks.N.norm_1, norm_2      encoder.layers.N.rms_norm1, rms_norm2   blocks.N.norm1, norm2
    trunk.blocks.N.attn.qkv            ...attention.q_proj, k_proj, v_proj     blocks.N.attn.qkv
    trunk.blocks.N.attn.proj           ...attention.out_proj                   blocks.N.attn.proj
    trunk.blocks.N.mlp.fc1, fc3, fc2   ...ffn.gate_proj, up_proj, down_proj    blocks.N.mlp.gate_, up_, down_proj
    trunk.post_trunk_norm              rms_norm                                post_layernorm

AIMv2 embeds one image, GLM-V a pair of frames: each frame gets half of the weight, so that an image that is both frames
has the embedding that it had. GLM-V adds rotary positions to the learned ones, which are all that AIMv2 has; the tower
learns to use them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from model.errors import ConfigError, WeightsError
from model.hf_config import CONFIG_FILE
from model.weights.folder import SafetensorsFolder
from model.weights.formats.opened import refuse_pickles
from model.weights.formats.views import Made, Rearranged, stacked, whole_tensor
from model.weights.source import WeightSource, some

# One line per tensor of the tower: its name below model.visual., and those in the two namings. {N} is a block.
Row = tuple[str, tuple[str, ...], tuple[str, ...]]
POSITIONS = "embeddings.position_embedding.weight"
PATCHES = "patch_embed.proj.weight"
AROUND: tuple[Row, ...] = (
    (PATCHES, ("preprocessor.patchifier.proj.weight",), ("embeddings.patch_embed.weight",)),
    ("patch_embed.proj.bias", ("preprocessor.patchifier.proj.bias",), ("embeddings.patch_embed.bias",)),
    ("post_conv_layernorm.weight", ("preprocessor.patchifier.norm.weight",), ("embeddings.rms_norm.weight",)),
    (POSITIONS, ("preprocessor.pos_embed",), (POSITIONS,)),
    ("post_layernorm.weight", ("trunk.post_trunk_norm.weight",), ("rms_norm.weight",)),
)
A, H, G = "trunk.blocks.{N}.", "encoder.layers.{N}.", "blocks.{N}."
IN_BLOCK: tuple[Row, ...] = (
    (G + "norm1.weight", (A + "norm_1.weight",), (H + "rms_norm1.weight",)),
    (G + "norm2.weight", (A + "norm_2.weight",), (H + "rms_norm2.weight",)),
    (
        G + "attn.qkv.weight",
        (A + "attn.qkv.weight",),
        (H + "attention.q_proj.weight", H + "attention.k_proj.weight", H + "attention.v_proj.weight"),
    ),
    (G + "attn.proj.weight", (A + "attn.proj.weight",), (H + "attention.out_proj.weight",)),
    (G + "mlp.gate_proj.weight", (A + "mlp.fc1.weight",), (H + "ffn.gate_proj.weight",)),
    (G + "mlp.up_proj.weight", (A + "mlp.fc3.weight",), (H + "ffn.up_proj.weight",)),
    (G + "mlp.down_proj.weight", (A + "mlp.fc2.weight",), (H + "ffn.down_proj.weight",)),
)
BLOCK = re.compile(r"(?:trunk\.blocks|encoder\.layers)\.(\d+)\..+")
HEAD_DIM = 128  # of AIMv2-Huge, where config.json does not say how many heads there are
IMAGE_SIZE = 336
FRAMES = 2


class Tower(NamedTuple):
    """A vision tower under the names of a GLM-V model; its sizes."""

    source: WeightSource
    sizes: dict[str, Any]  # keys of a vision_config
    naming: str


def open_aimv2(folder: Path, decoder_width: int) -> Tower:
    """Open the folder of AIMv2-Huge.

    Args:
        folder: The folder.
        decoder_width: Hidden size of the decoder that the tower is made for.

    Raises:
        WeightsError: It is another AIMv2, whose sizes or positions do not fit, or has other tensors.
        ConfigError: Its config.json has other settings.
    """
    refuse_pickles(folder)
    stored = SafetensorsFolder(folder)
    names = set(stored.names())
    column = 1 if "preprocessor.patchifier.proj.weight" in names else 2
    if AROUND[0][column][0] not in names:
        raise WeightsError(f"{folder} has no {AROUND[0][1][0]} and no {AROUND[0][2][0]}: it is not AIMv2")
    depth = 1 + max((int(found[1]) for name in names if (found := BLOCK.fullmatch(name))), default=-1)
    wanted: dict[str, tuple[str, ...]] = {row[0]: row[column] for row in AROUND}  # type: ignore[misc]
    for block in range(depth):
        wanted |= {row[0].format(N=block): tuple(name.format(N=block) for name in row[column]) for row in IN_BLOCK}
    if wanted[POSITIONS][0] not in names:
        raise WeightsError(
            f"{folder} has no table of positions ({wanted[POSITIONS][0]}): it is a '-native' AIMv2, whose positions "
            "are computed; take apple/aimv2-huge-patch14-336"
        )
    parts = [part for tensors in wanted.values() for part in tensors]
    if missing := [part for part in parts if part not in names] or ([] if depth else ["all blocks"]):
        raise WeightsError(f"{folder} lacks tensors of AIMv2: {some(missing)}")
    if unknown := sorted(names - set(parts)):
        raise WeightsError(f"{folder} has tensors that the vision tower of a GLM-V model has not: {some(unknown)}")
    if len(stored.shape(wanted[PATCHES][0])) != 4:
        raise WeightsError(
            f"{folder}: {wanted[PATCHES][0]} is no convolution of images: {stored.shape(wanted[PATCHES][0])}"
        )
    if len(stored.shape(wanted[POSITIONS][0])) == 3:
        stored.fold(wanted[POSITIONS][0])
    tensors = {f"model.visual.{name}": _tensor(stored, name, parts) for name, parts in wanted.items()}
    sizes = _sizes(folder, Rearranged(stored, tensors), depth, decoder_width)
    return Tower(Rearranged(stored, tensors), sizes, ("", "Apple's", "transformers'")[column])


def _tensor(source: WeightSource, name: str, parts: tuple[str, ...]) -> Made:
    if name == PATCHES:
        return stacked(source, *parts, change=_over_frames)
    return stacked(source, *parts) if len(parts) > 1 else whole_tensor(source, parts[0])


def _over_frames(weight: Tensor) -> Tensor:
    """Turn a convolution of an image [out, 3, 14, 14] into one of a pair of frames [out, 3, 2, 14, 14]."""
    return (weight / FRAMES)[:, :, None].expand(-1, -1, FRAMES, -1, -1).contiguous()


def _sizes(folder: Path, tower: WeightSource, depth: int, decoder_width: int) -> dict[str, Any]:
    width, _, _, patch, _ = tower.shape(f"model.visual.{PATCHES}")
    positions = tower.shape(f"model.visual.{POSITIONS}")[0]
    mlp = tower.shape("model.visual.blocks.0.mlp.gate_proj.weight")[0]
    image_size = patch * round(positions**0.5)
    if image_size != IMAGE_SIZE or mlp != decoder_width:
        raise WeightsError(
            f"{folder} is AIMv2 {width} wide with an MLP of {mlp}, for images of {image_size} pixels; in a GLM-V model "
            f"the MLP of the tower is as wide as the decoder, {decoder_width}, and images have {IMAGE_SIZE} pixels: "
            "take apple/aimv2-huge-patch14-336"
        )
    content = _config(folder)
    heads = content.get("num_attention_heads") or width // HEAD_DIM
    eps = content.get("rms_norm_eps", 1e-5)
    for key, value in (("qkv_bias", False), ("use_bias", False), ("mlp_bias", False), ("is_native", False)):
        if content.get(key, value) != value:
            raise ConfigError(
                f"{folder / CONFIG_FILE}: {key}={content[key]!r} is not supported: AIMv2-Huge has {value!r}"
            )
    sizes = {"hidden_size": width, "depth": depth, "num_heads": heads, "out_hidden_size": mlp, "image_size": image_size}
    return {**sizes, "patch_size": patch, "rms_norm_eps": eps}


def _config(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except OSError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{folder / CONFIG_FILE} is not valid JSON: {error}") from None
    return content if isinstance(content, dict) else {}
