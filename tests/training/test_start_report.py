"""What a run warns about when it starts."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from model.config import GlmvConfig
from pretrain.train import PretrainConfig
from sft.train import SftConfig
from tests.training_data import build, sentence
from training.config import RunConfig, load_config
from training.setup import prepare
from training.start_report import warnings_of

pytestmark = pytest.mark.fast


def warnings(config_file: Path, *overrides: str, schema: type[RunConfig] = RunConfig) -> list[str]:
    prepared = prepare(load_config(schema, config_file, ["train.global_batch_size=1", *overrides]))
    return list(warnings_of(prepared.config, prepared.model, prepared.loader, too_long=0.0))


def sources(shards: Path, names: Sequence[str], options: str = "") -> str:
    return f"data.sources=[{', '.join(f'{{path: {shards}/{name}{options}}}' for name in names)}]"


TEXT_ONLY = [
    # freeze, weight decay, what the warning says
    ("", 0.1, "so vision and adapter cannot learn: a step only multiplies their matrices by 1 - lr * 0.1. Set freeze="),
    ("vision", 0.1, "so adapter cannot learn: a step only"),
    ("", 0.0, "so vision and adapter cannot learn. Set freeze=[vision,adapter]"),
    ("vision,decoder", 0.1, "so adapter cannot learn, and the decoder is frozen: this run trains nothing. Set freeze="),
    (
        "decoder",
        0.1,
        "so vision and adapter cannot learn, and the decoder is frozen: this run trains nothing. Set freez",
    ),
]


@pytest.mark.parametrize(("freeze", "decay", "expected"), TEXT_ONLY)
def test_parts_that_text_cannot_train_are_named(
    config_file: Path, shards: Path, freeze: str, decay: float, expected: str
) -> None:
    settings = [f"freeze=[{freeze}]", f"optimizer.weight_decay={decay}"]
    [warning] = warnings(config_file, sources(shards, ["text"]), *settings)
    assert warning.startswith(f"no source in data.sources has an image or a video, {expected}")
    assert warning.find("freeze=[vision,adapter]") > 0


def test_text_with_frozen_vision_and_mixtures_with_images_are_not_warned_about(config_file: Path, shards: Path) -> None:
    assert not warnings(config_file, sources(shards, ["text"]), "freeze=[vision,adapter]")
    assert not warnings(config_file, sources(shards, ["text", "images"]))
    assert not warnings(config_file, sources(shards, ["text", "images"]), "freeze=[vision,decoder]")


@pytest.mark.parametrize("form", ["glm45v", "glm41v"])
def test_chats_in_the_form_of_the_other_model_are_named(config_file: Path, shards: Path, form: str) -> None:
    """Sources without chats have the form of their build too, but it does not matter there."""
    chats, wanted = ("chats", "glm41v") if form == "glm45v" else ("chats_glm41v", "glm45v")
    preset = "model.preset=tiny_dense" if wanted == "glm41v" else "model.preset=tiny_moe"
    [warning] = warnings(config_file, preset, sources(shards, ["images", "text", chats]))
    assert warning.startswith(f"source {chats!r} holds chats in the form {form}")
    assert f"index the source again with --chat-form {wanted}" in warning
    right = "chats_glm41v" if wanted == "glm41v" else "chats"
    assert not warnings(config_file, preset, sources(shards, ["images", "text", right]))


def test_chat_template_that_writes_other_prompts_is_named(
    config_file: Path, shards: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "tokenizer"))
    settings = [sources(shards, ["images", "chats"]), f"data.tokenizer={folder}"]
    assert not warnings(config_file, *settings)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    [warning] = warnings(config_file, *settings)
    assert warning.startswith(
        f"the chat template in {folder} writes chats differently than the chats of source 'chats'"
    )


def test_keys_of_frozen_or_missing_parts_are_named(config_file: Path, shards: Path) -> None:
    settings = ["optimizer.lr_scale.vision=0.1", "optimizer.lr_scale.router=2", "moe.balance_loss_coeff=0.5"]
    assert warnings(config_file, *settings, "freeze=[vision,decoder]") == [
        "optimizer.lr_scale.vision has no effect, because freeze names vision",
        "optimizer.lr_scale.router has no effect, because freeze names decoder",
        "moe.balance_loss_coeff has no effect, because freeze names decoder",
    ]
    assert warnings(config_file, *settings, "model.preset=tiny_dense") == [
        "optimizer.lr_scale.router has no effect, because the model is dense",
        "moe.balance_loss_coeff has no effect, because the model is dense",
    ]
    assert warnings(config_file, *settings) == []


def test_validation_that_never_happens_is_named(config_file: Path, shards: Path) -> None:
    keys = [f"validation.sources=[{{path: {shards}/images}}]", "validation.samples=[{prompt: Why?}]"]
    assert warnings(config_file, *keys) == [
        "validation.sources has no effect, because validation.interval is 0: set it to a number of steps",
        "the prompts of validation have no effect, because validation.samples_interval is 0: set it",
    ]


def test_keys_of_what_is_off_are_named(config_file: Path, shards: Path) -> None:
    keys = ["health.max_skipped=3", "profile.steps=7", "metrics.mlflow_experiment=x", "optimizer.cooldown_style=cosine"]
    off = ["checkpoint.save_interval=0", "checkpoint.keep_last=2", "health.spike_window=5"]
    assert warnings(config_file, *keys, *off) == [
        "health.spike_window has no effect, because health.spike_factor is 0",
        "health.max_skipped has no effect, because neither health.on_nonfinite nor health.on_spike is skip",
        "profile.steps has no effect, because profile.start is 0",
        "metrics.mlflow_experiment has no effect, because metrics.mlflow is empty",
        "checkpoint.keep_last has no effect, because checkpoint.save_interval is 0",
        "optimizer.cooldown_style has no effect, because optimizer.cooldown_steps is 0",
    ]
    assert not warnings(config_file, "health.on_nonfinite=skip", "health.max_skipped=3", "profile.start=1")


def test_sequences_longer_than_the_model_allows_are_warned_about(config_file: Path, shards: Path) -> None:
    mixture = sources(shards, ["text", "images"])
    longer = [mixture, "train.seq_length=16384", "data.sources=[{path: " + f"{shards}/images, epochs: 1}}]"]
    [warning] = warnings(config_file, *longer)
    assert warning.startswith("train.seq_length=16384 is above the model's max_position_embeddings 8192, and engines")
    assert "set model.max_position_embeddings=16384, and model.rope_theta if" in warning
    assert not warnings(config_file, *longer, "model.max_position_embeddings=16384")


def test_source_smaller_than_a_step_is_warned_about_with_the_number(
    config_file: Path, shards: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "records").mkdir()
    one = build(tmp_path / "records" / "one", [{"domain": "text", "text": sentence(3, 7)}], tokenizer_folder)
    mixture = [f"data.sources=[{{path: {shards}/images}}, {{path: {one}, weight: 3}}]", "train.global_batch_size=8"]
    [warning] = warnings(config_file, *mixture)
    found = re.fullmatch(
        r"source 'one' has only 1 samples: a step takes (\d+) from it, each about ([\d.]+) times. More data, or .*",
        warning,
    )
    assert found, warning
    loader = prepare(load_config(RunConfig, config_file, [*mixture, "data.num_workers=0"])).loader
    steps = [[name for batch in loader.next_step() for name in batch.sample_ids] for _ in range(4)]
    repeated = [sum(name.startswith("one-") for name in step) for step in steps]
    assert float(found[2]) == pytest.approx(sum(repeated) / 4, rel=0.2)
    assert int(found[1]) == round(float(found[2]))


def test_wait_for_lost_shards_that_would_count_as_a_hang_is_named(config_file: Path, shards: Path) -> None:
    times = ["health.hang_seconds=60", "data.retry_seconds=300"]
    assert warnings(config_file, sources(shards, ["text", "images"]), *times) == [
        "data.retry_seconds=300 is not below health.hang_seconds=60: a run that waits for a lost shard would be ended "
        "as if it hung"
    ]
    assert not warnings(config_file, sources(shards, ["text", "images"]), "health.hang_seconds=0")


def test_data_of_another_stage_is_named(config_file: Path, shards: Path, tmp_path: Path) -> None:
    init_from = f"model.init_from={tmp_path}"
    (tmp_path / "config.json").write_text(json.dumps(GlmvConfig.from_preset("tiny_moe").to_hf()))
    chats, captions = (sources(shards, [name]) for name in ("chats", "images"))
    [warning] = warnings(config_file, chats, schema=PretrainConfig)
    assert warning.startswith("every sample is a chat: this looks like fine-tuning, which is sft.train")
    [warning] = warnings(config_file, captions, init_from, schema=SftConfig)
    assert warning.startswith("no sample is a chat: this looks like pretraining, which is pretrain.train")
    assert not warnings(config_file, captions, schema=PretrainConfig)
    assert not warnings(config_file, sources(shards, ["chats", "images"]), init_from, schema=SftConfig)
