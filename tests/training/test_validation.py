"""Held-out losses and answers against transformers, at every layout; training with them equals training without."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_pipeline.domains.prompts import document_prompt
from data_pipeline.errors import DataError
from demo.held_out import encode, read_samples, transformers_loss
from model.config import ConfigError
from tests.data_pipeline.media_files import encoded, encoded_video, pattern
from tests.hf_folders import VARIANTS, save_weights
from tests.launch import fail, finish, has_reached, metrics, process_of_rank, start, train, wait_until
from tests.processes import Processes
from tests.training import validation_cases
from tests.training_data import build as build_shards
from tests.training_data import sentence
from tools.exported import Exported
from training.config import RunConfig, load_config
from training.hf_files import preprocessor_config
from training.setup import prepare
from training.validation import describe_held_out

EXACT = 1e-6  # relative, between layouts
TO_TRANSFORMERS = 1e-5  # relative
IMAGE_TOKENS = 16
ANSWER_TOKENS = 4
LAYOUTS = {
    "glm4v_moe": ["DP2", "TP2 SP", "PP2", "PP2 VPP2", "EP2", "CP2"],
    "glm4v": ["DP2", "TP2", "PP2", "PP2 VPP2", "CP2"],
}
FAST = {("glm4v_moe", "EP2"), ("glm4v", "PP2 VPP2")}
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
    prompts: list[dict[str, Any]] = [
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
            (folder / name).write_text(
                json.dumps(preprocessor_config(kind, {"image": IMAGE_TOKENS, "video": 60}[kind]))
            )
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
    """Before the first step against transformers, after one against one process; then the second step itself."""
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


def test_run_with_validation_equals_one_without_and_resumes(config: Path, tmp_path: Path) -> None:
    """The whole command, with a data worker: files, intervals, the last step, a resumed run."""
    off = ["validation.interval=0", "validation.samples_interval=0"]
    runs = {name: tmp_path / name for name in ("with", "without")}
    common = ["train.steps=5", "train.deterministic=true", "checkpoint.save_interval=4"]
    train(config, [*common, *off, f"train.output_dir={runs['without']}"], processes=1)
    output = train(config, [*common, f"train.output_dir={runs['with']}"], processes=1)
    assert "validation: 15 samples in 2 shards are held out" in output
    for name in ("loss", "grad_norm", "expert_load/max", "balance_loss"):
        assert [line[name] for line in metrics(runs["with"])] == [line[name] for line in metrics(runs["without"])]

    validation = runs["with"] / "validation.jsonl"
    lines = [json.loads(line) for line in validation.read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 5]
    assert all(line["validation/samples"] == 15 for line in lines)
    assert {"validation/loss", "validation/loss/image_text", "validation/loss/text"} <= set(lines[0])
    assert lines[0]["validation/loss"] > lines[2]["validation/loss"]
    pages = sorted(path.name for path in (runs["with"] / "samples").iterdir())
    assert pages == ["step_0000003.html", "step_0000003.json", "step_0000005.html", "step_0000005.json"]
    page = (runs["with"] / "samples" / "step_0000005.html").read_text()
    assert "What is this?" in page
    assert "a house" in page
    assert page.count("data:image/jpeg;base64,") == 2 + 2  # two images, and the video's frame pairs
    scalars = {tag for tag in tensorboard_tags(runs["with"]) if tag.startswith("validation/")}
    assert scalars == set(lines[0]) - {"step"}

    shutil.rmtree(runs["with"] / "checkpoints" / "step_0000005")
    (runs["with"] / "checkpoints" / "latest").write_text("step_0000004\n")
    validation.write_text("".join(f"{json.dumps(line)}\n" for line in lines if line["step"] != 4))  # as if given up
    train(config, [*common, f"train.output_dir={runs['with']}"], processes=1)
    again = [json.loads(line) for line in validation.read_text().splitlines()]
    times = {"validation/seconds"}
    assert [{k: line[k] for k in line.keys() - times} for line in again] == [
        {k: line[k] for k in line.keys() - times} for line in lines
    ]


def validations(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "validation/seconds"} for line in lines]


@pytest.mark.slow
def test_validation_that_a_stop_has_interrupted_is_repeated(config: Path, tmp_path: Path) -> None:
    """Once between two steps, once after the last: the second run is not complete before its last validation."""
    common = ["train.steps=3", "train.deterministic=true", "validation.samples_interval=0", "validation.steps=40"]
    train(config, [*common, f"train.output_dir={tmp_path}/whole"], processes=1)
    run = tmp_path / "run"
    for step in (2, 3):
        launcher = start(config, [*common, f"train.output_dir={run}"], processes=1)
        wait_until(has_reached, launcher, run, step=step)
        process_of_rank(launcher, 0).send_signal(signal.SIGUSR1)
        output = finish(launcher)
        assert f"the validation at step {step} is given up" in output
        assert f"stopped at step {step} by SIGUSR1 on rank 0; the same command resumes" in output
    assert [line["step"] for line in validations(run)] == [2]
    train(config, [*common, f"train.output_dir={run}"], processes=1)
    assert validations(run) == validations(tmp_path / "whole")
    assert json.loads((run / "state.json").read_text())["state"] == "complete"


def tensorboard_tags(run: Path) -> list[str]:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return list(events.Tags()["scalars"])


# --- what cannot work -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["validation.sources=[]"], "validation.sources is empty: name at least one"),
        (["validation.sources=[{path: nowhere}]"], "validation.sources: nowhere does not exist"),
        (["validation.sources=[{path: ''}]"], "a source in validation.sources has no path"),
        (["validation.interval=-1"], "validation.interval=-1: give 0 or a positive number"),
        (["validation.samples_max_tokens=0"], "validation.samples_max_tokens=0: give a positive number"),
        (["validation.samples=[]"], "validation.samples_interval=3, but there are no prompts"),
        (["validation.samples=[{prompt: x, images: [no.png]}]"], "no.png cannot be read: No such file or directory"),
        (["validation.samples=[{prompt: <image>}]"], "the prompt says <image> 1 times, but 0 are given"),
        (["validation.samples=[{answer: x}]"], r"validation.samples\[0\] has no prompt, image or video"),
        (["validation.samples=[{question: x}]"], "unknown key 'validation.samples\\[\\].question'"),
        (["validation.samples_max_tokens=120"], "it exceeds train.seq_length: shorten it, or lower"),
        (["validation.samples_file=none.jsonl"], "validation.samples_file=none.jsonl cannot be read"),
    ],
)
@pytest.mark.fast
def test_mistakes_are_refused_at_start(config: Path, overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        prepare(load_config(RunConfig, config, overrides))
    assert not (tmp_path / "run").exists()


@pytest.mark.fast
def test_prompts_are_read_from_a_file(config: Path, tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(encoded(pattern(56, 56, seed=1), format="PNG"))
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "What?", "images": ["image.png"]}\n\n{"prompt": "Once\u2028", "document": true}\n', "utf-8"
    )
    overrides = ["validation.samples=[]", f"validation.samples_file={file}"]
    prompts = prepare(load_config(RunConfig, config, overrides)).validation.prompts
    assert [prompt.config.prompt for prompt in prompts] == ["What?", "Once\u2028"]
    assert [len(prompt.sample.grids) for prompt in prompts] == [1, 0]
    for line, message in (
        ("[]", "prompts.jsonl:1 is not a JSON object"),
        ('{"prompt": 3}', "prompts.jsonl:1: prompt is 3; it must be a str"),
        ('{"text": "x"}', "prompts.jsonl:1: unknown key 'text'"),
        ("{", "prompts.jsonl:1 is not valid JSON"),
    ):
        file.write_text(line)
        with pytest.raises(ConfigError, match=message):
            prepare(load_config(RunConfig, config, overrides))


@pytest.mark.fast
def test_training_shards_are_not_held_out(config: Path, shards: Path, held_out: Held, tmp_path: Path) -> None:
    """A copy under another name is the same shard; the same images in another shard are counted."""
    copied = tmp_path / "copied"
    copied.mkdir()
    for file in (shards / "images").glob("images-*"):
        shutil.copy(file, copied / file.name.replace("images-", "copy-"))
    overrides = [f"validation.sources=[{{path: {copied}}}]"]
    with pytest.raises(DataError, match=r"shard copy-\S+.tar is also a training shard \(images-\S+.tar of source 'ima"):
        prepare(load_config(RunConfig, config, overrides))
    allowed = prepare(load_config(RunConfig, config, [*overrides, "validation.allow_overlap=true"]))
    assert list(describe_held_out(allowed.held_out_sources, allowed.loader.sources)) == [
        "validation: 24 samples in 1 shards are held out",
        "validation: 1 of these shards are also training shards",
        "validation: 24 of these samples have a record, image or video that is also in the training data",
    ]
    chats = prepare(load_config(RunConfig, config, [f"validation.sources=[{{path: {shards / 'chats'}}}]"]))
    assert list(describe_held_out(chats.held_out_sources, chats.loader.sources)) == [
        "validation: 12 samples in 1 shards are held out",
        "validation: 12 of these samples have a record, image or video that is also in the training data",
    ]


@pytest.mark.fast
def test_held_out_samples_without_a_loss_token_are_refused(
    config: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Questions longer than a sequence, whose answers are cut off."""
    records: list[dict[str, object]] = [
        {
            "domain": "chat",
            "messages": [{"role": "user", "content": sentence(n, 400)}, {"role": "assistant", "content": "x"}],
        }
        for n in range(3)
    ]
    source = build_shards(tmp_path / "long", records, tokenizer_folder)
    overrides = [f"validation.sources=[{{path: {source}}}]", "data.too_long=truncate"]
    with pytest.raises(
        DataError, match=r"no token of 0 samples carries loss \(samples that cannot be used: 3 nothing_to_learn\)"
    ):
        prepare(load_config(RunConfig, config, overrides))


@pytest.mark.fast
def test_held_out_shard_that_cannot_be_read_is_named(config: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    source = build_shards(tmp_path / "lost", [{"domain": "text", "text": sentence(1, 20)}], tokenizer_folder)
    [shard] = source.glob("*.tar")
    shard.unlink()
    shard.mkdir()
    with pytest.raises(DataError, match=r"validation\.sources: a shard of source 'lost' is lost: .*cannot be read"):
        prepare(load_config(RunConfig, config, [f"validation.sources=[{{path: {source}}}]"]))


def test_mistakes_are_one_line_of_the_command(config: Path, tmp_path: Path) -> None:
    errors = fail(config, ["validation.sources=[{path: nowhere}]"], processes=1)
    assert len(errors) == 1
    assert errors[0].startswith("validation.sources: nowhere does not exist")
    assert not (tmp_path / "run").exists()
