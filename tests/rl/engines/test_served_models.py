"""Which served models are the policy: as transformers describes them, with all defaults, and with one value changed."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from model.config import GlmvConfig
from rl.engines.server import check_config
from rl.errors import EngineError
from tests.hf_folders import VARIANTS
from tests.reference import HF_CONFIGS, small_config

ADDRESS = "http://10.0.0.7:8000"
pytestmark = pytest.mark.fast


def described(content: dict[str, Any]) -> dict[str, Any]:
    """Return what PolicyWorker says of the model with this config.json, after its way through HTTP."""
    content = dict(content)
    content.pop("architectures")
    config: transformers.PretrainedConfig = HF_CONFIGS[content["model_type"]](**content)
    return json.loads(json.dumps(config.to_dict()))


@pytest.mark.parametrize("name", ["tiny_dense", "tiny_moe", "glm41v_9b", "glm45v", "glm46v"])
def test_the_policy_itself_is_accepted(name: str, tmp_path: Path) -> None:
    """Read from its config.json as transformers writes it, too."""
    model = small_config(name) if name == "glm46v" else GlmvConfig.from_preset(name)
    served = described(model.to_hf())
    check_config(ADDRESS, served, model)
    HF_CONFIGS[model.hf_type](**served).save_pretrained(tmp_path)
    check_config(ADDRESS, json.loads((tmp_path / "config.json").read_text()), model)


def test_what_training_alone_uses_may_differ() -> None:
    model = small_config("glm4v")
    other = replace(model.decoder, max_position_embeddings=65536, initializer_range=0.02, pad_token_id=3)
    check_config(ADDRESS, described(replace(model, decoder=other).to_hf()), model)


CHANGED: list[tuple[str, Any, str]] = [
    ("text_config.num_hidden_layers", 5, "its text_config.num_hidden_layers is 5, the policy's is 4"),
    ("text_config.rms_norm_eps", 1e-6, "its text_config.rms_norm_eps is 1e-06, the policy's is 1e-05"),
    ("text_config.rope_parameters.rope_theta", 5e5, "its text_config.rope_theta is 500000.0, the policy's is 10000.0"),
    (
        "text_config.rope_parameters.mrope_section",
        [4, 2, 2],
        "its text_config.mrope_section is (4, 2, 2), the policy's is (2, 3, 3)",
    ),
    ("text_config.eos_token_id", [0, 7], "its text_config.eos_token_id is (0, 7), the policy's is (0, 7, 9)"),
    ("text_config.hidden_act", "gelu", "its config.json: text_config.hidden_act='gelu' is not supported"),
    ("text_config.attention_bias", False, "its config.json: text_config.attention_bias=False is not supported"),
    ("vision_config.rms_norm_eps", 1e-6, "its vision_config.rms_norm_eps is 1e-06, the policy's is 1e-05"),
    ("vision_config.image_size", 448, "its vision_config.image_size is 448, the policy's is 336"),
    ("vision_config.rope_parameters.rope_theta", 5e5, "with rope_theta 500000.0 is not supported"),
    ("image_token_id", 36, "its image_token_id is 36, the policy's is 34"),
    ("model_type", "qwen2_5_vl", "its model_type is 'qwen2_5_vl', the policy's is 'glm4v"),
]
CHANGED_EXPERTS = [
    ("text_config.routed_scaling_factor", 2.5, "its text_config.routed_scaling_factor is 2.5, the policy's is 1.7"),
    ("text_config.num_experts_per_tok", 4, "its text_config.num_experts_per_tok is 4, the policy's is 2"),
    ("text_config.norm_topk_prob", False, "its config.json: text_config.norm_topk_prob=False is not supported"),
]
CASES = [(variant, *case) for variant in VARIANTS for case in CHANGED]
CASES += [("glm4v_moe", *case) for case in CHANGED_EXPERTS]


@pytest.mark.parametrize(("variant", "key", "value", "message"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_a_model_with_another_value_is_refused(variant: str, key: str, value: Any, message: str) -> None:
    model = small_config(variant)
    served = described(model.to_hf())
    *path, last = key.split(".")
    section = served
    for name in path:
        section = section[name]
    assert section[last] != value
    section[last] = value
    with pytest.raises(EngineError, match=re.escape(message)) as error:
        check_config(ADDRESS, served, model)
    assert str(error.value).startswith(f"{ADDRESS} serves another model")
    assert str(error.value).endswith("start it with the folder of the policy, or correct rollout.addresses")
    assert "\n" not in str(error.value)


def test_the_other_variant_is_refused() -> None:
    with pytest.raises(EngineError, match="its model_type is 'glm4v', the policy's is 'glm4v_moe'"):
        check_config(ADDRESS, described(small_config("glm4v").to_hf()), small_config("glm4v_moe"))
