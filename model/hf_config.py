"""Read and complete the content of a Hugging Face `config.json`, in the meaning that transformers gives it.

Every key that changes what transformers computes is either read (a field of `model.config`), or fixed: this
implementation computes with one value, and a file with another value is refused. A missing key means transformers'
default for the variant.

GLM-4.6V has the model type of GLM-4.5V, `glm4v_moe`. GLM-4.6V-Flash computes what GLM-4.1V does, under the type
`glm46v`: a frame around whatever `text_config.model_type` names, of which the dense decoder is supported.

Rotary embedding has two spellings. transformers 4 and the published files write `rope_theta`, `partial_rotary_factor`
and `rope_scaling.mrope_section`; transformers 5 writes all of them into `rope_parameters`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.errors import ConfigError
from model.other_trainers import how_to_bring

CONFIG_FILE = "config.json"

ARCHITECTURES = {
    "glm4v_moe": "Glm4vMoeForConditionalGeneration",
    "glm4v": "Glm4vForConditionalGeneration",
    "glm46v": "Glm46VForConditionalGeneration",
}
# The decoder and tower inside each model type. They have the names of their own: what glm46v computes is a glm4v.
VARIANTS = {"glm4v_moe": "glm4v_moe", "glm4v": "glm4v", "glm46v": "glm4v"}

# Keys of a text_config that only the mixture-of-experts variant has.
MOE_KEYS = (
    "moe_intermediate_size",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "first_k_dense_replace",
    "routed_scaling_factor",
    "n_group",
    "topk_group",
    "norm_topk_prob",
)
# Keys that a text_config of either variant must have. All are sizes.
REQUIRED_TEXT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
REQUIRED_MOE = MOE_KEYS[:6]

# Values that this implementation computes with.
FIXED_TOP: dict[str, Any] = {"tie_word_embeddings": False}
FIXED_TEXT: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": True,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "use_qk_norm": False,
}
FIXED_VISION: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "in_channels": 3,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
}
VISION_ROPE_THETA = 10000.0

# Where a file says how its weights are quantised, and the methods whose weights can be read (`model.weights.formats`).
# That they are FP8 is seen from the weights; training and exports have plain ones.
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
READ_QUANTIZATION = (("fp8", None), ("compressed-tensors", None), ("compressed-tensors", "float-quantized"))

# Other names that transformers accepts for the same key.
TEXT_ALIASES = {"num_local_experts": "n_routed_experts"}
VISION_ALIASES = {"num_attention_heads": "num_heads", "num_hidden_layers": "depth"}

# transformers' defaults that differ from those of the fields in model.config.
DEFAULTS_TOP: dict[str, dict[str, int]] = {
    "glm4v_moe": {},
    "glm4v": {"image_token_id": 151343, "video_token_id": 151344},
    "glm46v": {
        "image_token_id": 151343,
        "video_token_id": 151344,
        "video_start_token_id": 151361,
        "video_end_token_id": 151362,
    },
}
DEFAULTS_TEXT = {
    "glm4v_moe": {"max_position_embeddings": 65536, "partial_rotary_factor": 0.5},
    "glm4v": {"max_position_embeddings": 32768, "partial_rotary_factor": 1.0},
}
DEFAULT_VISION = {"intermediate_size": 13696}
DEFAULT_ROPE_THETA = 10000.0
DEFAULT_MROPE_SECTION = [8, 12, 12]


# --- the folder -------------------------------------------------------------------------------------------------------


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of a Hugging Face folder's config.json.

    Raises:
        ConfigError: the file is missing or is not a JSON object.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ConfigError(f"{folder} has no {CONFIG_FILE}: it is not a Hugging Face model folder{how_to_bring(folder)}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return content


# --- the content ------------------------------------------------------------------------------------------------------


def model_type_of(content: Mapping[str, Any], source: str) -> str:
    """Return the model type, a key of ARCHITECTURES.

    Raises:
        ConfigError: the model is of another architecture.
    """
    model_type = content.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ConfigError(
            f"{source}: model_type {model_type!r} is not a GLM-V model; "
            f"accepted: {', '.join(f'{k} ({v})' for k, v in ARCHITECTURES.items())}"
        )
    inner = content.get("text_config", {})
    wanted = f"{VARIANTS[model_type]}_text"
    if model_type == "glm46v" and isinstance(inner, dict) and inner.get("model_type", wanted) != wanted:
        raise ConfigError(
            f"{source}: text_config.model_type={inner['model_type']!r} is not supported in a {model_type}, whose "
            f"decoder is a {wanted}: GLM-4.6V itself has model_type 'glm4v_moe'"
        )
    return str(model_type)


def variant_of(content: Mapping[str, Any], source: str) -> str:
    """Return what the model computes, "glm4v_moe" or "glm4v". Raises ConfigError, as `model_type_of` does."""
    return VARIANTS[model_type_of(content, source)]


def top_fields(content: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the token ids and check the other keys at the top of the file.

    Raises:
        ConfigError: a key has a value that is not supported.
    """
    _check_fixed(content, FIXED_TOP, f"{source}: ")
    _check_quantization(content, source)
    given = {key: value for key, value in content.items() if key.endswith("_token_id") and value is not None}
    return DEFAULTS_TOP[model_type_of(content, source)] | given


def text_fields(content: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return text_config with all that transformers would derive: rope, head_dim and defaults.

    Raises:
        ConfigError: a key is missing, or has a value that is not supported.
    """
    variant, where = variant_of(content, source), f"{source}: text_config"
    text = _section(content, "text_config", TEXT_ALIASES, source)
    is_moe = variant == "glm4v_moe"
    if missing := [key for key in REQUIRED_TEXT + (REQUIRED_MOE if is_moe else ()) if key not in text]:
        raise ConfigError(f"{where} lacks {', '.join(missing)}")
    _check_fixed(text, FIXED_TEXT, f"{where}.")
    rope = rope_of(text, where, default_factor=DEFAULTS_TEXT[variant]["partial_rotary_factor"])
    if rope.pop("rope_type") != "default":
        raise ConfigError(f"{where} has another rope_type than 'default', which is the only one supported")
    fields = DEFAULTS_TEXT[variant] | text | rope
    if not is_moe:
        fields = {key: value for key, value in fields.items() if key not in MOE_KEYS}
    return fields


def vision_fields(content: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return vision_config with transformers' defaults.

    Raises:
        ConfigError: a key has a value that is not supported.
    """
    where = f"{source}: vision_config"
    vision = _section(content, "vision_config", VISION_ALIASES, source)
    _check_fixed(vision, FIXED_VISION, f"{where}.")
    rope = rope_of(vision, where)
    if rope["rope_type"] not in ("default", "axial") or rope["rope_theta"] != VISION_ROPE_THETA:
        raise ConfigError(
            f"{where}: rope_type {rope['rope_type']!r} with rope_theta {rope['rope_theta']!r} is not supported: the "
            f"vision tower of GLM-V models has 'axial' with {VISION_ROPE_THETA}"
        )
    if "head_dim" in vision and vision["head_dim"] * vision.get("num_heads", 12) != vision.get("hidden_size", 1536):
        raise ConfigError(f"{where}.head_dim={vision['head_dim']!r} is not hidden_size / num_heads: remove it")
    return DEFAULT_VISION | vision


def _check_quantization(content: Mapping[str, Any], source: str) -> None:
    for where, section in (("", content), ("text_config.", content.get("text_config"))):
        for key in QUANTIZATION_KEYS:
            found = section.get(key) if isinstance(section, dict) else None
            method = (found.get("quant_method"), found.get("format")) if isinstance(found, dict) else ()
            if found and method not in READ_QUANTIZATION:
                raise ConfigError(
                    f"{source}: {where}{key}={found!r} is not supported; 'fp8' is, and 'compressed-tensors' with the "
                    "format 'float-quantized': bring the weights without it, or their FP8 release"
                )


def remove_quantization(content: dict[str, Any]) -> bool:
    """Remove what a config.json says about quantised weights, for weights that are plain. Return whether it did."""
    sections = (content, content.get("text_config"), content.get("vision_config"))
    found = [(each, key) for each in sections if isinstance(each, dict) for key in QUANTIZATION_KEYS if key in each]
    for section, key in found:
        del section[key]
    return bool(found)


def _section(content: Mapping[str, Any], name: str, aliases: Mapping[str, str], source: str) -> dict[str, Any]:
    """Return one of the two inner objects without null values and with one name per key."""
    found = content.get(name)
    if not isinstance(found, dict) or not found:
        raise ConfigError(f"{source}: text_config and vision_config must both be present")
    section = {key: value for key, value in found.items() if value is not None}
    for alias, key in aliases.items():
        value = section.pop(alias, None)
        if value is not None and section.setdefault(key, value) != value:
            raise ConfigError(f"{source}: {name}.{alias}={value!r} contradicts {key}={section[key]!r}: remove one")
    return section


def _check_fixed(found: Mapping[str, Any], fixed: Mapping[str, Any], prefix: str) -> None:
    for key, value in fixed.items():
        if found.get(key) is not None and found[key] != value:
            expected = f"GLM-V models have {value!r}" if value is not None else "bring the weights without it"
            raise ConfigError(f"{prefix}{key}={found[key]!r} is not supported: {expected}")


# --- rotary embedding -------------------------------------------------------------------------------------------------

ROPE_KEYS = ("rope_theta", "partial_rotary_factor", "mrope_section")


def rope_of(section: Mapping[str, Any], where: str, default_factor: float = 1.0) -> dict[str, Any]:
    """Return rope_type, rope_theta, partial_rotary_factor and mrope_section of a text_config or vision_config.

    The values are those that transformers 5 takes: from `rope_scaling`, or else `rope_parameters`, then from the
    section itself.

    Raises:
        ConfigError: the spellings contradict each other.
    """
    scaling, parameters = (section.get(key) or {} for key in ("rope_scaling", "rope_parameters"))
    if not (isinstance(scaling, dict) and isinstance(parameters, dict)):
        raise ConfigError(f"{where}: rope_scaling and rope_parameters must be JSON objects")
    taken = scaling or parameters
    values = {
        "rope_type": taken.get("rope_type", taken.get("type", "default")),
        "rope_theta": taken.get("rope_theta", section.get("rope_theta", DEFAULT_ROPE_THETA)),
        "partial_rotary_factor": taken.get(
            "partial_rotary_factor", section.get("partial_rotary_factor", default_factor)
        ),
        "mrope_section": taken.get("mrope_section", DEFAULT_MROPE_SECTION),
    }
    for key in ROPE_KEYS:
        for place in (scaling, parameters, section):
            if place.get(key, values[key]) != values[key]:
                raise ConfigError(
                    f"{where} gives {key} twice, as {values[key]!r} and as {place[key]!r}: make rope_scaling, "
                    "rope_parameters and the keys beside them agree"
                )
    return values


def add_old_rope_spelling(content: dict[str, Any]) -> bool:
    """Write the spelling of transformers 4 beside `rope_parameters` in the content of a config.json.

    Older engines read no other one, and lose the 3-D rope without a message. transformers 5 reads the same values.

    Returns:
        Whether anything was missing.
    """
    text = content["text_config"]
    missing = bool(text.get("rope_parameters")) and not text.get("rope_scaling")
    if missing:
        rope = rope_of(text, "text_config", DEFAULTS_TEXT[VARIANTS[content["model_type"]]]["partial_rotary_factor"])
        text["rope_theta"], text["partial_rotary_factor"] = rope["rope_theta"], rope["partial_rotary_factor"]
        text["rope_scaling"] = {"rope_type": rope["rope_type"], "mrope_section": rope["mrope_section"]}
    return missing


def with_one_rope_spelling(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a config.json with rope in one spelling, for comparing two files."""
    text = content.get("text_config")
    if content.get("model_type") not in ARCHITECTURES or not isinstance(text, dict):
        return dict(content)
    rope = rope_of(text, "text_config", DEFAULTS_TEXT[VARIANTS[content["model_type"]]]["partial_rotary_factor"])
    spelled = {"rope_scaling", "rope_parameters", *ROPE_KEYS}
    return {**content, "text_config": {**{k: v for k, v in text.items() if k not in spelled}, **rope}}
