"""GLM-4.6V and GLM-4.6V-Flash: tiny models with their rope base and length against transformers' classes for them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from model.canonical_names import canonical_name
from model.config import GlmvConfig
from model.errors import ConfigError
from model.glmv import GlmvModel
from model.hf_config import add_old_rope_spelling
from model.parallel import ParallelConfig
from model.weights.load import SafetensorsFolder, load_weights
from tests.model.test_parity import GRADIENTS, LOGITS, PACK, SAMPLES
from tests.model_tensors import hf_tensors
from tests.reference import (
    HF_CONFIGS,
    forward_inputs,
    make_sample,
    pack,
    reference_gradients,
    save_transformers_model,
    small_config,
    transformers_logits,
    transformers_loss,
)

# Model types of the published folders, and the variant that each computes.
TYPES = {"glm4v_moe": "glm4v_moe", "glm46v": "glm4v"}
# The base of GLM-4.6V-Flash. That of GLM-4.1V gives other logits, as a test below shows.
LONG: dict[str, Any] = {"rope_theta": 500_000.0, "max_position_embeddings": 131_072}


def tiny(hf_type: str) -> GlmvConfig:
    config = small_config(hf_type)
    return replace(config, decoder=replace(config.decoder, **LONG))


@pytest.fixture(scope="module", params=TYPES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    folder = tmp_path_factory.mktemp(request.param)
    return folder, save_transformers_model(tiny(request.param), folder)


@pytest.fixture
def model(saved: tuple[Path, nn.Module], single_process: None) -> GlmvModel:
    folder, reference = saved
    reference.zero_grad()
    model = GlmvModel(GlmvConfig.from_hf(folder), ParallelConfig())
    load_weights([model], SafetensorsFolder(folder))
    return model


@pytest.mark.fast
@pytest.mark.parametrize("name", ["text", "one image", "video and images"])
def test_logits_equal_transformers(model: GlmvModel, saved: tuple[Path, nn.Module], name: str) -> None:
    one = make_sample(model.glmv_config, SAMPLES[name], seed=len(name))
    with torch.no_grad():
        expected = transformers_logits(saved[1], one)
        found = model(**forward_inputs(pack([one], seq_length=len(one.encoded), segment_multiple=1)))
    assert 0.5 < expected.std() < 2
    assert (found - expected).abs().max() <= LOGITS


def test_every_gradient_equals_transformers(model: GlmvModel, saved: tuple[Path, nn.Module]) -> None:
    model.train()
    samples = [make_sample(model.glmv_config, SAMPLES[name], seed=len(name)) for name in PACK]
    transformers_loss(saved[1], samples).backward()
    batch = pack(samples, seq_length=256)
    losses = model(**forward_inputs(batch), labels=batch.labels)
    ((losses * batch.loss_mask).sum() / batch.loss_mask.sum()).backward()
    found = {
        canonical_name(model, name): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    expected = reference_gradients(saved[1])
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = ((found[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)).item()
        assert math.isfinite(error)
        assert error <= GRADIENTS, f"{name}: {error:.1e}"


@pytest.mark.fast
def test_another_rope_base_misses_the_tolerance_a_hundredfold(saved: tuple[Path, nn.Module], model: GlmvModel) -> None:
    config = replace(model.glmv_config, decoder=replace(model.glmv_config.decoder, rope_theta=10_000.0))
    other = GlmvModel(config, ParallelConfig())
    load_weights([other], SafetensorsFolder(saved[0]))
    one = make_sample(config, SAMPLES["one image"], seed=1)
    inputs = forward_inputs(pack([one], seq_length=len(one.encoded), segment_multiple=1))
    with torch.no_grad():
        assert (model(**inputs) - other(**inputs)).abs().max() >= 100 * LOGITS


@pytest.mark.fast
def test_export_has_the_tensors_of_the_folder(model: GlmvModel, saved: tuple[Path, nn.Module]) -> None:
    source, exported = SafetensorsFolder(saved[0]), dict(hf_tensors(model))
    assert sorted(exported) == sorted(source.names())


# --- config.json ------------------------------------------------------------------------------------------------------


def spellings(content: dict[str, Any]) -> Sequence[dict[str, Any]]:
    """Return the spelling of transformers 5, both, and that of transformers 4."""
    both = json.loads(json.dumps(content))
    add_old_rope_spelling(both)
    old = json.loads(json.dumps(both))
    del old["text_config"]["rope_parameters"]
    return content, both, old


@pytest.mark.fast
def test_every_spelling_gives_the_same_model(saved: tuple[Path, nn.Module]) -> None:
    content = json.loads((saved[0] / "config.json").read_text())
    for spelling in spellings(content):
        config = GlmvConfig.from_hf_dict(json.loads(json.dumps(spelling)), "config.json")
        assert config == tiny(content["model_type"])
        assert config.hf_type == content["model_type"]
        assert config.variant == TYPES[content["model_type"]]
        read = HF_CONFIGS[content["model_type"]](**spelling).text_config
        assert read.rope_parameters["rope_theta"] == LONG["rope_theta"]
        assert read.max_position_embeddings == LONG["max_position_embeddings"]


@pytest.mark.fast
def test_flash_has_the_token_ids_of_transformers_where_its_file_has_none() -> None:
    content = tiny("glm46v").to_hf()
    for key in [key for key in content if key.endswith("_token_id")]:
        del content[key]
    config, expected = GlmvConfig.from_hf_dict(content, "config.json"), transformers.Glm46VConfig()
    for key in ("image_token_id", "video_token_id", "video_start_token_id", "video_end_token_id"):
        assert getattr(config, key) == getattr(expected, key)


@pytest.mark.fast
def test_flash_with_experts_is_refused_by_name() -> None:
    content = tiny("glm46v").to_hf()
    content["text_config"]["model_type"] = "glm4v_moe_text"
    with pytest.raises(ConfigError, match=r"text_config.model_type='glm4v_moe_text' is not supported in a glm46v"):
        GlmvConfig.from_hf_dict(content, "config.json")


@pytest.mark.fast
def test_flash_computes_what_glm41v_computes() -> None:
    """Not a bit differs between transformers' two classes with the same weights, so one implementation serves both."""
    newer = tiny("glm46v")
    older = replace(newer, hf_type="glm4v")
    content = {config.hf_type: config.to_hf() for config in (newer, older)}
    models = {}
    for name, each in content.items():
        architecture = getattr(transformers, each.pop("architectures")[0])
        torch.manual_seed(0)
        models[name] = architecture(architecture.config_class(**each)).eval()
    models["glm4v"].load_state_dict(models["glm46v"].state_dict())
    one = make_sample(newer, SAMPLES["video and images"], seed=3)
    with torch.no_grad():
        assert torch.equal(*(transformers_logits(model, one) for model in models.values()))
