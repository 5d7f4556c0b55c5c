"""A language model alone as the decoder of a GLM-V model: GLM-4.5-Air (`glm4_moe`) and GLM-4-9B-0414 (`glm4`).

    model.X     model.language_model.X
    lm_head.X   lm_head.X

Layers above `num_hidden_layers` predict further tokens (MTP: GLM-4.5-Air has one, `model.layers.46`). A GLM-V model has
no such layer: they are dropped by name, and only if they have the tensors of one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from model.errors import ConfigError, WeightsError
from model.hf_config import CONFIG_FILE, DEFAULT_ROPE_THETA, MOE_KEYS, REQUIRED_TEXT, read_config, rope_of
from model.weights.formats.opened import open_folder
from model.weights.formats.views import Rearranged, whole_tensor
from model.weights.source import WeightSource, some

# The variant of GLM-V model that each decoder is part of, and transformers' defaults for it.
DECODERS: dict[str, str] = {"glm4_moe": "glm4v_moe", "glm4": "glm4v"}
DEFAULTS: dict[str, dict[str, Any]] = {
    "glm4_moe": {"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "attention_bias": False},
    "glm4": {"max_position_embeddings": 131072, "rms_norm_eps": 1.5625e-7, "attention_bias": True, "head_dim": 128},
}
PARTIAL_ROTARY_FACTOR = 0.5
# Keys of the decoder's file that a text_config of GLM-V does not have, or has in another spelling.
NOT_TAKEN = ("model_type", "architectures", "rope_scaling", "rope_parameters", "num_nextn_predict_layers")
# What every layer for further tokens has, and no other layer.
MTP_TENSORS = ("enorm.weight", "hnorm.weight", "eh_proj.weight")
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
OLD_GLM = "transformer.encoder.layers."


class Decoder(NamedTuple):
    """A decoder under the names of a GLM-V model."""

    variant: str
    source: WeightSource
    text_config: dict[str, Any]  # as in a GLM-V model's config.json, in the spelling of transformers 4
    read_as: tuple[str, ...]
    dropped: tuple[str, ...]  # names of tensors in the folder


def open_decoder(folder: Path) -> Decoder:
    """Open the folder of a language model.

    Raises:
        ConfigError: It is another model, or has settings that are not supported.
        WeightsError: Its weights are in another format.
    """
    content = read_config(folder)
    model_type = content.get("model_type")
    if model_type not in DECODERS:
        old = " (glm-4-9b before 0414: its layers are transformer.encoder.layers)" if model_type == "chatglm" else ""
        raise ConfigError(
            f"{folder / CONFIG_FILE}: model_type {model_type!r}{old} is not the decoder of a GLM-V model: take "
            "GLM-4.5-Air (glm4_moe) or GLM-4-9B-0414 (glm4)"
        )
    source, read_as = open_folder(folder)
    names = source.names()
    if old_names := [name for name in names if name.startswith(OLD_GLM)]:
        raise WeightsError(f"{folder} has the tensors of an older glm-4-9b, {some(old_names, 1)}: take GLM-4-9B-0414")
    dropped = _further_layers(names, content.get("num_hidden_layers", 0), folder)
    kept = {_name_in_glmv(name): whole_tensor(source, name) for name in names if name not in dropped}
    text = _text_config(content, model_type, str(folder / CONFIG_FILE))
    return Decoder(DECODERS[model_type], Rearranged(source, kept), text, read_as, tuple(sorted(dropped)))


def _name_in_glmv(name: str) -> str:
    return "model.language_model." + name.removeprefix("model.") if name.startswith("model.") else name


def _further_layers(names: list[str], layers: Any, folder: Path) -> set[str]:
    """Return the tensors of layers for further tokens. Raises WeightsError if a layer too many is none of those."""
    above: dict[int, set[str]] = {}
    for name in names:
        found = LAYER.fullmatch(name)
        if found and isinstance(layers, int) and int(found[1]) >= layers:
            above.setdefault(int(found[1]), set()).add(found[2])
    for layer, tensors in sorted(above.items()):
        if lacking := [name for name in MTP_TENSORS if name not in tensors]:
            raise WeightsError(
                f"{folder}: num_hidden_layers is {layers}, but there is a layer {layer}, which lacks {some(lacking)} "
                "and so predicts no further token: config.json belongs to other weights"
            )
    return {f"model.layers.{layer}.{tensor}" for layer, tensors in above.items() for tensor in tensors}


def _text_config(content: Mapping[str, Any], model_type: str, source: str) -> dict[str, Any]:
    """Return the decoder's configuration as a text_config. Its three axes of positions divide the rotated pairs."""
    own = {key: value for key, value in content.items() if value is not None}
    if wrong := [key for key in REQUIRED_TEXT if type(own.get(key)) is not int]:
        raise ConfigError(f"{source}: {', '.join(wrong)} must be integers")
    text = {**DEFAULTS[model_type], **{key: value for key, value in own.items() if key not in NOT_TAKEN}}
    if model_type == "glm4":
        text = {key: value for key, value in text.items() if key not in MOE_KEYS}
    rope = rope_of(own, source, default_factor=PARTIAL_ROTARY_FACTOR)
    if rope["rope_type"] != "default":
        raise ConfigError(f"{source}: rope_type {rope['rope_type']!r} is not supported: GLM-V models have 'default'")
    head_dim = text.get("head_dim") or text["hidden_size"] // max(1, text["num_attention_heads"])
    if not (isinstance(head_dim, int) and isinstance(rope["partial_rotary_factor"], int | float)):
        raise ConfigError(f"{source}: head_dim and partial_rotary_factor must be numbers")
    pairs = int(head_dim * rope["partial_rotary_factor"]) // 2
    return {
        **text,
        "model_type": f"{DECODERS[model_type]}_text",
        "rope_theta": rope.get("rope_theta", DEFAULT_ROPE_THETA),
        "partial_rotary_factor": rope["partial_rotary_factor"],
        "rope_scaling": {"rope_type": "default", "mrope_section": mrope_section(pairs)},
    }


def mrope_section(pairs: int) -> list[int]:
    """Return how many rotated pairs time, height and width get, in the proportions of GLM-4.5V.

    >>> mrope_section(32)
    [8, 12, 12]
    """
    time = pairs // 4
    height = (pairs - time) // 2
    return [time, height, pairs - time - height]
