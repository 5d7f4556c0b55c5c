"""The Hugging Face files of a checkpoint, read by transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil

from data_pipeline.config import DataConfig
from data_pipeline.encoding.tokenizer import GlmTokenizer
from demo.tokenizer import train_tokenizer
from model.config import ConfigError, GlmvConfig
from tests.hf_folders import save_weights, save_whole_folder
from tests.reference import PRESETS
from training.hf_files import check_tokenizer, read_inherited, write_hf_files

pytestmark = pytest.mark.fast


def published_spelling(folder: Path) -> None:
    """Rewrite config.json as the published files of these models are: transformers 4."""
    (folder / "config.json").write_text(json.dumps(GlmvConfig.from_hf(folder).to_hf()))


def both_spellings(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    text = content["text_config"]
    text["rope_theta"] = content["rope_theta"] = text["rope_parameters"]["rope_theta"]
    content["max_position_embeddings"] = text["max_position_embeddings"]
    (folder / "config.json").write_text(json.dumps(content))


def transformers_5_spelling(folder: Path) -> None:
    assert "rope_theta" not in json.loads((folder / "config.json").read_text())["text_config"]


SPELLINGS = [published_spelling, transformers_5_spelling, both_spellings]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("variant", list(PRESETS))
def test_changed_length_and_rope_base_reach_transformers(tmp_path: Path, variant: str, spelling) -> None:
    start, out = tmp_path / "start", tmp_path / "out"
    save_weights(variant, start)
    spelling(start)
    given = GlmvConfig.from_hf(start)
    model = replace(given, decoder=replace(given.decoder, max_position_embeddings=4321, rope_theta=5e5))
    out.mkdir()
    write_hf_files(out, model, DataConfig(tokenizer=str(tmp_path)), read_inherited(start, model))

    before, after = AutoConfig.from_pretrained(start).to_dict(), AutoConfig.from_pretrained(out).to_dict()
    text = after["text_config"]
    assert text["max_position_embeddings"] == 4321
    assert text["rope_parameters"]["rope_theta"] == 5e5
    assert GlmvConfig.from_hf(out) == model
    assert "10000" not in json.dumps(json.loads((out / "config.json").read_text())["text_config"])
    # Everything else is as it was.
    text["max_position_embeddings"] = before["text_config"]["max_position_embeddings"]
    text["rope_parameters"]["rope_theta"] = before["text_config"]["rope_parameters"]["rope_theta"]
    for content in (before, after):
        for key in ("rope_theta", "max_position_embeddings", "_name_or_path"):
            content.pop(key, None)
        content["text_config"].pop("rope_theta", None)
    assert after == before


def test_unchanged_configuration_is_inherited_byte_for_byte(tmp_path: Path) -> None:
    save_weights("glm4v_moe", tmp_path)
    given = (tmp_path / "config.json").read_text()
    assert read_inherited(tmp_path, GlmvConfig.from_hf(tmp_path))["config.json"] == given
    assert read_inherited(None, GlmvConfig.from_hf(tmp_path)) == {}


@pytest.mark.parametrize("section", ["", "text_config"])
def test_what_a_file_says_about_fp8_is_not_inherited(tmp_path: Path, section: str) -> None:
    """A run holds plain weights: engines that read an export would look for scales."""
    file = save_weights("glm4v_moe", tmp_path) / "config.json"
    content = json.loads(file.read_text())
    (content[section] if section else content)["quantization_config"] = {"quant_method": "fp8"}
    file.write_text(json.dumps(content))
    model = GlmvConfig.from_hf(tmp_path)
    inherited = read_inherited(tmp_path, model)["config.json"]
    assert "quantization_config" not in inherited
    assert GlmvConfig.from_hf_dict(json.loads(inherited), "config.json") == model


def test_preprocessors_of_the_start_point_are_kept_with_the_budget_of_the_run(tmp_path: Path) -> None:
    start, out = save_whole_folder("glm4v_moe", tmp_path / "start"), tmp_path / "out"
    file = start / "preprocessor_config.json"
    own = {**json.loads(file.read_text()), "image_processor_type": "OwnImageProcessor", "own_key": 7}
    file.write_text(json.dumps(own))
    model = GlmvConfig.from_hf(start)
    out.mkdir()
    data = DataConfig(tokenizer=str(start), image_max_tokens=123)
    write_hf_files(out, model, data, read_inherited(start, model))
    written = json.loads((out / file.name).read_text())
    assert written.pop("size")["longest_edge"] == 123 * 28 * 28 * 2
    assert written == {key: value for key, value in own.items() if key != "size"}


def test_files_that_have_the_budget_already_stay_byte_for_byte(tmp_path: Path) -> None:
    start, out = save_whole_folder("glm46v", tmp_path / "start"), tmp_path / "out"
    model = GlmvConfig.from_hf(start)
    out.mkdir()
    data = DataConfig(tokenizer=str(start), image_max_tokens=6144, video_max_tokens=30000)
    write_hf_files(out, model, data, read_inherited(start, model))
    assert {path.name for path in out.iterdir()} >= {"preprocessor_config.json", "chat_template.jinja"}
    for path in out.iterdir():
        if path.name != "generation_config.json":
            assert path.read_bytes() == (start / path.name).read_bytes(), path.name


def inner_processors(folder: Path) -> dict[str, dict[str, Any]]:
    """Move the processors of a folder into processor_config.json, where transformers 5 saves them."""
    inner = {}
    for key, name in (("image_processor", "preprocessor_config"), ("video_processor", "video_preprocessor_config")):
        inner[key] = json.loads((folder / f"{name}.json").read_text())
        (folder / f"{name}.json").unlink()
    content = {"processor_class": "Glm46VProcessor", **inner}
    (folder / "processor_config.json").write_text(json.dumps(content))
    return content


def test_processors_inside_one_file_are_kept_with_the_budgets_of_the_run(tmp_path: Path) -> None:
    start, out = save_whole_folder("glm46v", tmp_path / "start"), tmp_path / "out"
    given = inner_processors(start)
    model = GlmvConfig.from_hf(start)
    out.mkdir()
    data = DataConfig(tokenizer=str(start), image_max_tokens=123, video_max_tokens=456)
    write_hf_files(out, model, data, read_inherited(start, model))
    written = json.loads((out / "processor_config.json").read_text())
    for key, tokens in (("image_processor", 123), ("video_processor", 456)):
        assert written[key].pop("size")["longest_edge"] == tokens * 28 * 28 * 2
        del given[key]["size"]
    assert written == given


def test_processors_inside_one_file_that_training_does_not_follow_are_refused(tmp_path: Path) -> None:
    start = save_whole_folder("glm46v", tmp_path / "start")
    content = inner_processors(start)
    content["video_processor"]["patch_size"] = 16
    (start / "processor_config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"processor_config.json: patch_size is 16, but training uses 14"):
        read_inherited(start, GlmvConfig.from_hf(start))


def test_a_flash_without_processors_gets_those_of_its_class(tmp_path: Path) -> None:
    model = GlmvConfig.from_hf(save_weights("glm46v", tmp_path / "start"))
    (out := tmp_path / "out").mkdir()
    write_hf_files(out, model, DataConfig(tokenizer=str(tmp_path)), read_inherited(tmp_path / "start", model))
    image, video = (json.loads((out / f"{name}preprocessor_config.json").read_text()) for name in ("", "video_"))
    assert image["image_processor_type"] == Glm46VImageProcessorPil.__name__.removesuffix("Pil")
    assert video["video_processor_type"] == "Glm46VVideoProcessor"
    assert {image["processor_class"], video["processor_class"]} == {"Glm46VProcessor"}


def tokenizer_of(processor_class: str, folder: Path) -> GlmTokenizer:
    """Return a tokenizer for the tiny models, in a folder that names a class of processors."""
    train_tokenizer(["What is in this image? A cat on a mat.", "0123456789"] * 8, folder)
    content = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**content, "processor_class": processor_class}))
    return GlmTokenizer(folder)


@pytest.mark.parametrize("processor_class", ["Glm46VProcessor", "Glm4vProcessor", ""])
def test_new_processors_are_those_of_the_tokenizer(tmp_path: Path, processor_class: str) -> None:
    """Videos were sampled as the tokenizer's folder says, so an export must say the same."""
    start, out = save_weights("glm4v_moe", tmp_path / "start"), tmp_path / "out"
    out.mkdir()
    tokenizer = tokenizer_of(processor_class, tmp_path / "tokenizer")
    model = GlmvConfig.from_hf(start)
    check_tokenizer(model, tokenizer, start)
    write_hf_files(out, model, DataConfig(tokenizer=str(tokenizer.folder)), read_inherited(start, model))
    video = json.loads((out / "video_preprocessor_config.json").read_text())
    assert video["processor_class"] == (processor_class or "Glm4vProcessor")
    assert GlmTokenizer(out).generation == tokenizer.generation


@pytest.mark.parametrize(
    ("variant", "other"), [("glm46v", "Glm4vProcessor"), ("glm46v", ""), ("glm4v", "Glm46VProcessor")]
)
def test_tokenizer_of_another_generation_than_the_start_point_is_refused(
    tmp_path: Path, variant: str, other: str
) -> None:
    start = save_whole_folder(variant, tmp_path / "start")
    model = GlmvConfig.from_hf(start)
    check_tokenizer(model, GlmTokenizer(start), start)
    tokenizer = tokenizer_of(other, tmp_path / "tokenizer")
    with pytest.raises(ConfigError, match=r"has the processors of GLM-4.*Use the folder of the start point"):
        check_tokenizer(model, tokenizer, start)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"image_mean": [0.5, 0.5, 0.5]}, "image_mean is .*but training uses"),
        ({"patch_size": 16}, "patch_size is 16, but training uses 14"),
        ({"do_normalize": False}, "do_normalize is False, but training uses True"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0, but training uses 0.0039"),
        ({"resample": 2}, "resample is 2, but training uses 3"),
    ],
)
def test_preprocessors_that_training_does_not_follow_are_refused(tmp_path: Path, content, message: str) -> None:
    start = save_whole_folder("glm4v_moe", tmp_path / "start")
    file = start / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **content}))
    with pytest.raises(ConfigError, match=f"preprocessor_config.json.*{message}"):
        read_inherited(start, GlmvConfig.from_hf(start))


@pytest.mark.parametrize("content", [b"damaged", b"[]", b"\xff"])
@pytest.mark.parametrize("name", ["preprocessor_config.json", "generation_config.json"])
def test_damaged_files_of_the_start_point_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    start = save_whole_folder("glm4v_moe", tmp_path / "start")
    (start / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name} is not a JSON object: restore it, or remove it"):
        read_inherited(start, GlmvConfig.from_hf(start))
