"""config.json files: what transformers reads from them is what this model reads, or they are refused by name."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from model import hf_config
from model.config import ConfigError, DecoderConfig, GlmvConfig, VisionConfig
from model.hf_config import FIXED_TEXT, FIXED_TOP, FIXED_VISION, add_old_rope_spelling
from tests.reference import HF_CONFIGS, PRESETS

pytestmark = pytest.mark.fast

VARIANTS = tuple(HF_CONFIGS)


def tiny(variant: str) -> GlmvConfig:
    return replace(GlmvConfig.from_preset(PRESETS[hf_config.VARIANTS[variant]]), hf_type=variant)


def content_of(variant: str) -> dict[str, Any]:
    """Return a complete config.json in the old spelling."""
    return json.loads(json.dumps(tiny(variant).to_hf()))


def saved_by_transformers(variant: str, folder: Path) -> dict[str, Any]:
    """Return the same model as `save_pretrained` of transformers 5 spells it."""
    HF_CONFIGS[variant](**content_of(variant)).save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def as_transformers_reads(variant: str, content: dict[str, Any]) -> GlmvConfig:
    """Return the model that transformers would build from a config.json, with every value spelled out."""
    config = HF_CONFIGS[variant](**copy.deepcopy(content))
    text, vision = config.text_config, config.vision_config
    complete = content_of(variant)
    for section, read in ((complete["text_config"], text), (complete["vision_config"], vision)):
        for key in section:
            if getattr(read, key, None) is not None:
                section[key] = getattr(read, key)
    rope = text.rope_parameters
    complete["text_config"] |= {
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        "rope_theta": rope["rope_theta"],
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0),
        "rope_scaling": {"rope_type": "default", "mrope_section": rope.get("mrope_section", [8, 12, 12])},
    }
    for key in complete:
        if key.endswith("_token_id"):
            complete[key] = getattr(config, key)
    return GlmvConfig.from_hf_dict(complete, "complete")


# --- two spellings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["glm45v", "glm41v_9b", "tiny_moe", "tiny_dense"])
def test_a_preset_comes_back_from_its_own_config_json(preset: str) -> None:
    config = GlmvConfig.from_preset(preset)
    assert GlmvConfig.from_hf_dict(json.loads(json.dumps(config.to_hf())), "config.json") == config


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_spellings_of_rope_give_the_same_model(variant: str, tmp_path: Path) -> None:
    new = saved_by_transformers(variant, tmp_path)
    assert "rope_scaling" not in new["text_config"]
    both = copy.deepcopy(new)
    add_old_rope_spelling(both)
    old = copy.deepcopy(both)
    del old["text_config"]["rope_parameters"]
    expected = tiny(variant)
    for content in (new, both, old):
        assert GlmvConfig.from_hf_dict(content, "config.json") == expected
        read = HF_CONFIGS[variant](**copy.deepcopy(content)).text_config.rope_parameters
        assert read == HF_CONFIGS[variant](**copy.deepcopy(new)).text_config.rope_parameters


def test_the_old_spelling_is_that_of_the_published_files(tmp_path: Path) -> None:
    content = saved_by_transformers("glm4v_moe", tmp_path)
    add_old_rope_spelling(content)
    text = content["text_config"]
    assert (text["rope_theta"], text["partial_rotary_factor"]) == (10000.0, 0.5)
    assert text["rope_scaling"] == {"rope_type": "default", "mrope_section": [2, 3, 3]}


@pytest.mark.parametrize(
    ("key", "value"), [("rope_theta", 1e6), ("partial_rotary_factor", 1.0), ("mrope_section", [4, 2, 2])]
)
def test_contradicting_spellings_are_refused(key: str, value: Any, tmp_path: Path) -> None:
    content = saved_by_transformers("glm4v_moe", tmp_path)
    add_old_rope_spelling(content)
    content["text_config"]["rope_parameters"][key] = value
    with pytest.raises(ConfigError, match=f"text_config gives {key} twice"):
        GlmvConfig.from_hf_dict(content, "config.json")


# --- every key --------------------------------------------------------------------------------------------------------

# Keys of transformers' classes that change nothing in what the model computes from its tokens.
INERT = {
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",  # adds a loss of transformers' own
    "problem_type",
    "return_dict",
    "router_aux_loss_coef",
    "transformers_version",
    "use_cache",
}
ROPE = {"rope_parameters"}
SECTIONS = {
    "": (GlmvConfig, FIXED_TOP),
    "text_config": (DecoderConfig, FIXED_TEXT),
    "vision_config": (VisionConfig, FIXED_VISION),
}


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_key_of_transformers_is_read_or_fixed(variant: str, section: str) -> None:
    config = HF_CONFIGS[variant]()
    keys = set((getattr(config, section) if section else config).to_dict()) - {"text_config", "vision_config"}
    schema, fixed = SECTIONS[section]
    assert keys <= {field.name for field in fields(schema)} | set(fixed) | ROPE | INERT | {"initializer_range"}


def removals(variant: str) -> Iterator[tuple[str, str, str]]:
    content = content_of(variant)
    del content["text_config"]["pad_token_id"], content["text_config"]["eos_token_id"]  # for generation alone
    for section in SECTIONS:
        yield from ((variant, section, key) for key in (content[section] if section else content))


@pytest.mark.parametrize(("variant", "section", "key"), [case for variant in VARIANTS for case in removals(variant)])
def test_a_missing_key_means_what_it_means_to_transformers(variant: str, section: str, key: str) -> None:
    content = content_of(variant)
    del (content[section] if section else content)[key]
    try:
        read = GlmvConfig.from_hf_dict(content, "config.json")
    except ConfigError:
        return  # asked for, or the default does not fit the other keys
    assert read == as_transformers_reads(variant, content)


OTHER_VALUES = [
    ("", "tie_word_embeddings", True),
    ("", "quantization_config", {"quant_method": "awq"}),
    ("", "quantization_config", {"quant_method": "compressed-tensors", "format": "pack-quantized"}),
    ("text_config", "quantization_config", {"quant_method": "gptq"}),
    ("text_config", "tie_word_embeddings", True),
    ("text_config", "hidden_act", "gelu"),
    ("text_config", "attention_bias", False),
    ("text_config", "attention_dropout", 0.1),
    ("text_config", "use_qk_norm", True),
    ("text_config", "rms_norm_eps", 0),
    ("text_config", "rms_norm_eps", math.nan),
    ("text_config", "rope_theta", 0),
    ("text_config", "rope_theta", math.inf),
    ("text_config", "initializer_range", -0.02),
    ("text_config", "hidden_size", "128"),
    ("text_config", "num_hidden_layers", 4.0),
    ("text_config", "rope_scaling", {"rope_type": "yarn", "factor": 4.0, "mrope_section": [2, 3, 3]}),
    ("text_config", "rope_scaling", {"rope_type": "default", "mrope_section": [4, 4]}),
    ("text_config", "rope_scaling", "default"),
    ("vision_config", "hidden_act", "gelu"),
    ("vision_config", "attention_bias", True),
    ("vision_config", "attention_dropout", 0.1),
    ("vision_config", "in_channels", 1),
    ("vision_config", "patch_size", 16),
    ("vision_config", "temporal_patch_size", 1),
    ("vision_config", "spatial_merge_size", 4),
    ("vision_config", "image_size", [336, 336]),
    ("vision_config", "image_size", 7),
    ("vision_config", "head_dim", 32),
    ("vision_config", "num_attention_heads", 8),
    ("vision_config", "rope_theta", 1e6),
    ("vision_config", "rope_parameters", {"rope_type": "axial", "rope_theta": 1e6}),
    ("vision_config", "rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
    ("vision_config", "rms_norm_eps", 0.0),
]
OTHER_VALUES_MOE = [
    ("text_config", "n_group", 2),
    ("text_config", "topk_group", 2),
    ("text_config", "norm_topk_prob", False),
    ("text_config", "n_shared_experts", 0),
    ("text_config", "n_routed_experts", 0),
    ("text_config", "num_local_experts", 4),
    ("text_config", "num_experts_per_tok", 0),
    ("text_config", "num_experts_per_tok", 9),
    ("text_config", "first_k_dense_replace", 4),
    ("text_config", "routed_scaling_factor", 0),
]
OTHER_VALUES_DENSE = [("text_config", "head_dim", 16), ("text_config", "num_attention_heads", 8)]
CASES = [
    *((variant, *case) for variant in VARIANTS for case in OTHER_VALUES),
    *(("glm4v_moe", *case) for case in OTHER_VALUES_MOE),
    *((variant, *case) for variant in ("glm4v", "glm46v") for case in OTHER_VALUES_DENSE),
]
SAID = {"rope_scaling": "rope|mrope", "rope_parameters": "rope", "num_attention_heads": "num_.*heads|head_dim"}


@pytest.mark.parametrize(("variant", "section", "key", "value"), CASES)
def test_a_value_that_is_not_supported_is_refused_by_name(variant: str, section: str, key: str, value: Any) -> None:
    content = content_of(variant)
    (content[section] if section else content)[key] = value
    with pytest.raises(ConfigError, match=rf"config\.json: ?.*{SAID.get(key, key)}"):
        GlmvConfig.from_hf_dict(content, "config.json")


def test_more_rotated_dimensions_than_a_head_has_are_refused() -> None:
    decoder = GlmvConfig.from_preset("tiny_moe").decoder
    sections = (decoder.head_dim // 2, decoder.head_dim // 4, decoder.head_dim // 4)
    with pytest.raises(ConfigError, match=r"text_config\.partial_rotary_factor=2\.0 must be at most 1"):
        replace(decoder, partial_rotary_factor=2.0, mrope_section=sections)


def test_transformers_other_names_of_a_key_are_read() -> None:
    content = content_of("glm4v_moe")
    content["text_config"]["num_local_experts"] = content["text_config"].pop("n_routed_experts")
    content["vision_config"]["num_attention_heads"] = content["vision_config"].pop("num_heads")
    content["vision_config"]["num_hidden_layers"] = content["vision_config"].pop("depth")
    assert GlmvConfig.from_hf_dict(content, "config.json") == GlmvConfig.from_preset("tiny_moe")


@pytest.mark.parametrize("text", ["{", "[]", '"glm4v"', "\xff"])
def test_a_damaged_file_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.json is not"):
        GlmvConfig.from_hf(tmp_path)
