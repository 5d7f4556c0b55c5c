"""Held-out losses and answers against transformers, at every layout; training with them equals training without."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from demo.evaluate import encode, read_samples, transformers_loss
from tests.data_pipeline.media_files import encoded, encoded_video, pattern
from tests.hf_folders import VARIANTS, save_weights
from tests.launch import fail, metrics, train
from tests.processes import Processes
from tests.training import validation_cases
from tests.training_data import build as build_shards
from tests.training_data import chat, sentence
from tools.generate import Exported, document_prompt
from training.hf_files import preprocessor_config
from training.start_report import CHAT_FORMS

EXACT = 1e-6  # relative, between layouts
TO_TRANSFORMERS = 1e-5  # relative
IMAGE_TOKENS = 16
ANSWER_TOKENS = 6
LAYOUTS = {
    "glm4v_moe": ["DP2", "TP2 SP", "PP2", "PP2 VPP2", "EP2", "CP2"],
    "glm4v": ["DP2", "TP2", "PP2", "PP2 VPP2", "CP2"],
}
FAST = {("glm4v_moe", "EP2"), ("glm4v_moe", "TP2 SP"), ("glm4v", "PP2 VPP2"), ("glm4v", "CP2")}
CASES = [
    pytest.param(variant, layout, id=f"{variant}-{layout}", marks=[] if (variant, layout) in FAST else pytest.mark.slow)
    for variant in VARIANTS
    for layout in LAYOUTS[variant]
]


class Held(NamedTuple):
    """A folder of shards to hold out, and prompts."""

    sources: list[Path]
    prompts: list[dict[str, Any]]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Held:
    folder = tmp_path_factory.mktemp("held_out")
    media = folder / "media"
    media.mkdir()
    for n in range(10):
        (media / f"{n}.jpg").write_bytes(encoded(pattern(70 + 8 * (n % 5), 84 + 9 * (n % 7), seed=100 + n)))
    (media / "0.mp4").write_bytes(encoded_video(frames=12))
    records: dict[str, list[dict[str, object]]] = {
        "captions": [
            {"domain": "image_text", "text": sentence(50 + n, 6 + n), "images": [f"media/{n}.jpg"]} for n in range(8)
        ],
        "words": [{"domain": "text", "text": sentence(60 + n, 30 + 4 * n)} for n in range(7)],
    }
    sources = [build_shards(folder / name, lines, tokenizer_folder) for name, lines in records.items()]
    prompts = [
        {"prompt": "What is this?", "images": [str(media / "8.jpg")], "answer": "a house"},
        {"prompt": "a small", "document": True},
        {"prompt": "", "images": [str(media / "9.jpg")], "document": True},
        {"prompt": "Is it in <video>?", "videos": [str(media / "0.mp4")]},
        {"prompt": "Why, and where are the old trees by the wide river?"},
    ]
    return Held(sources, prompts)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> dict[str, Path]:
    """By variant, a Hugging Face folder that transformers wrote, with the tokenizer of the shards."""
    folders = {}
    for variant in VARIANTS:
        folder = save_weights(variant, tmp_path_factory.mktemp(f"hf_{variant}"))
        shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
        for name, kind in (("preprocessor_config.json", "image"), ("video_preprocessor_config.json", "video")):
            (folder / name).write_text(json.dumps(preprocessor_config(kind, {"image": IMAGE_TOKENS, "video": 60}[kind])))
        folders[variant] = folder
    return folders


@pytest.fixture
def config(config_file: Path, held_out: Held) -> Path:
    """The run of `config_file` with validation."""
    content = OmegaConf.load(config_file)
    content.validation = {
        "sources": [{"path": str(path)} for path in held_out.sources],
        "interval": 2,
        "samples": held_out.prompts,
        "samples_interval": 3,
        "samples_max_tokens": ANSWER_TOKENS,
    }
    OmegaConf.save(content, config_file)
    return config_file


@pytest.fixture(scope="module")
def one_process() -> Iterator[Processes]:
    with Processes(1) as processes:
        yield processes


@pytest.fixture(scope="module")
def two_processes() -> Iterator[Processes]:
    with Processes(2) as processes:
        yield processes


@pytest.fixture(scope="module")
def transformers(models: dict[str, Path], held_out: Held) -> dict[str, dict[str, Any]]:
    """By variant, the loss of each domain and the answers, as transformers computes them, one sample at a time."""
    found = {}
    for variant, folder in models.items():
        exported = Exported.load(folder, dtype=torch.float32)
        losses = {}
        for source, domain in zip(held_out.sources, ("image_text", "text"), strict=True):
            samples = encode(read_samples(source), exported.glm_tokenizer, exported.budget)
            losses[domain] = transformers_loss(exported, samples)
        found[variant] = {"losses": losses, "answers": [ask(exported, prompt) for prompt in held_out.prompts]}
    return found


def ask(exported: Exported, prompt: dict[str, Any]) -> str:
    images, videos = ([Path(name).read_bytes() for name in prompt.get(kind, ())] for kind in ("images", "videos"))
    counts = {"images": len(images), "videos": len(videos)}
    make = document_prompt if prompt.get("document") else exported.chat_prompt
    sample = exported.encode(make(prompt["prompt"], **counts), images, videos)
    return exported.generate(sample, max_new_tokens=ANSWER_TOKENS)


def settings_of(folder: Path, *more: str) -> list[str]:
    return ["model.preset=", f"model.init_from={folder}", "data.num_workers=0", "train.steps=3", *more]


@pytest.mark.parametrize(("variant", "layout"), CASES)
def test_losses_and_answers_equal_transformers_and_leave_training_as_it_is(
    variant: str,
    layout: str,
    config: Path,
    models: dict[str, Path],
    transformers: dict[str, dict[str, Any]],
    one_process: Processes,
    two_processes: Processes,
) -> None:
    """Before the first step against transformers, after each step against one process; then the training itself."""
    case: dict[str, Any] = {"config": str(config), "overrides": settings_of(models[variant]), "steps": 2}
    [one] = one_process.run(validation_cases.run, layout="", validate=True, **case)
    with_validation = two_processes.run(validation_cases.run, layout=layout, validate=True, **case)
    without = two_processes.run(validation_cases.run, layout=layout, validate=False, **case)

    expected = transformers[variant]
    for got in (one, *with_validation):
        assert got["losses"][0]["domain_losses"] == pytest.approx(expected["losses"], rel=TO_TRANSFORMERS)
        assert [answer.text for answer in got["answers"][0]] == expected["answers"]
        assert got["losses"][0]["samples"] == 15
        assert got["is training"]
    for got in with_validation:
        for loss, of_one in zip(got["losses"], one["losses"], strict=True):
            assert loss["loss"] == pytest.approx(of_one["loss"], rel=EXACT)
            assert loss["domain_losses"] == pytest.approx(of_one["domain_losses"], rel=EXACT)
            assert loss["tokens"] == of_one["tokens"]
    assert len({got["losses"][-1]["loss"] for got in with_validation}) == 1
    assert [got["reports"] for got in with_validation] == [got["reports"] for got in without]
    assert [got["digest"] for got in with_validation] == [got["digest"] for got in without]
