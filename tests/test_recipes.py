"""The recipes in configs/glm45v and configs/glm41v: complete, as published, possible on their GPUs, trained small.

A miniature is a recipe with configs/tiny/miniature_*.yaml over it, on two CPU processes. Of reinforcement learning it
asks for handwritten digits, and starts from a model that has learned from a few.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.sharding.build import build_shards
from demo import digits
from demo.records import Library
from demo.records import sources as sources_of_the_demo
from model.config import ConfigError
from pretrain.train import PretrainConfig
from rl.config import RlConfig
from rl.setup import longest_prompt
from sft.train import SftConfig
from tests.launch import ROOT, metrics, train
from training.config import RunConfig, load_config
from training.dry_run import dry_run

CONFIGS = ROOT / "configs"
FILES = [path for folder in ("base", "glm45v", "glm41v") for path in sorted((CONFIGS / folder).glob("*.yaml"))]
STAGES = ("pretrain", "long_context", "sft", "sft_64k", "sft_lora", "rl")
SCHEMAS: dict[str, type[RunConfig]] = {"pretrain": PretrainConfig, "sft": SftConfig, "rl": RlConfig}
RECIPES = [(model, stage) for model in ("glm45v", "glm41v") for stage in STAGES]
MINIATURES = {"glm45v": "miniature_moe", "glm41v": "miniature_dense"}
HEADER = re.compile(
    r"^# .*Not run on a GPU\.\n"
    r"# (\d+) GPUs of 80 GB: torchrun --nnodes (\d+) --nproc_per_node 8 -m (\w+)\.train --config (\S+)\n"
)


@dataclass(frozen=True)
class Recipe:
    """A recipe, with what its first lines say."""

    file: Path
    gpus: int
    nodes: int
    entry: str
    shown_file: str  # in the launch command

    def load(self, *overrides: str, over: str = "") -> RunConfig:
        files = [self.file, *([CONFIGS / "tiny" / f"{over}.yaml"] if over else [])]
        return load_config(SCHEMAS[self.entry], files, overrides)


def entry_of(stage: str) -> str:
    return next((entry for entry in SCHEMAS if stage.startswith(entry)), "pretrain")


def recipe(model: str, stage: str) -> Recipe:
    file = CONFIGS / model / f"{stage}.yaml"
    header = HEADER.match(file.read_text())
    assert header, f"{file} does not begin with its launch command"
    return Recipe(file, int(header[1]), int(header[2]), header[3], header[4])


# --- what is written --------------------------------------------------------------------------------------------------


def leaves(text: str) -> Iterator[tuple[str, int]]:
    """Yield name and line of every value, from 0; a list is one value."""

    def walk(node: Any, prefix: str) -> Iterator[tuple[str, int]]:
        for key, value in node.value:
            if isinstance(value, yaml.MappingNode):
                yield from walk(value, f"{prefix}{key.value}.")
            else:
                yield f"{prefix}{key.value}", key.start_mark.line

    yield from walk(yaml.compose(text, yaml.SafeLoader), "")


@pytest.mark.fast
@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_value_says_whether_it_is_published(file: Path) -> None:
    lines = file.read_text().splitlines()
    for name, number in leaves(file.read_text()):
        own, above = lines[number].partition(" # ")[2], []
        for line in reversed(lines[:number]):
            if not line.lstrip().startswith("#"):
                break
            above.append(line.lstrip().removeprefix("# "))
        said = own or (above[-1] if above else "")
        assert name == "base" or re.match(r"(published|ours): \w", said), f"{file}: {name} has no published: or ours:"


@pytest.mark.fast
def test_every_recipe_exists_and_every_file_is_one() -> None:
    assert {path for path in FILES if path.parent.name != "base"} == {recipe(*names).file for names in RECIPES}


@pytest.mark.fast
@pytest.mark.parametrize(("model", "stage"), RECIPES)
def test_recipe_is_refused_by_the_other_command(model: str, stage: str) -> None:
    """Before model.init_from is missed, a key is unknown, or anything is touched."""
    file, right = recipe(model, stage).file, entry_of(stage)
    for schema in (schema for entry, schema in SCHEMAS.items() if entry != right):
        with pytest.raises(ConfigError, match=rf"train.stage=\w+: .*run it with {right}.train, or set train.stage= if"):
            load_config(schema, file, ["model.init_from="])
    own = load_config(SCHEMAS[right], file, ["train.stage=", "model.init_from=x", "model.preset=tiny_moe"])
    assert own.train.stage == ""


# Of the report (arXiv 2507.01006, sections 3.2 and 4); None: not published.
PUBLISHED = {
    # stage: tokens, packs, steps
    "pretrain": (8192, 1536, 120_000),
    "long_context": (32_768, 1536, 10_000),
    "sft": (32_768, 32, None),
}
PARALLEL = {
    # TP, EP, PP, CP at 32,768 tokens
    "glm45v": (1, 8, 4, 4),
    "glm41v": (2, 1, 1, 4),
}


@pytest.mark.fast
@pytest.mark.parametrize(("model", "stage"), [(m, s) for m, s in RECIPES if s in PUBLISHED])
def test_published_numbers(model: str, stage: str) -> None:
    config = recipe(model, stage).load()
    tokens, packs, steps = PUBLISHED[stage]
    assert (config.train.seq_length, config.train.global_batch_size) == (tokens, packs)
    assert steps in (None, config.train.steps)
    tp, ep, pp, cp = PARALLEL[model]
    assert config.parallel.tensor_model_parallel_size == tp
    assert config.parallel.expert_model_parallel_size == ep
    assert config.parallel.pipeline_model_parallel_size == pp
    assert config.parallel.context_parallel_size == (cp if tokens > 8192 else 1)
    assert (config.moe.balance_loss_coeff, config.moe.expert_bias_update_rate) == (1e-4, 1e-3)


@pytest.mark.fast
@pytest.mark.parametrize(("model", "stage"), RECIPES)
def test_recipe_is_possible_on_its_gpus_and_on_no_odd_number(
    model: str, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = recipe(model, stage)
    assert chosen.gpus == 8 * chosen.nodes
    assert ROOT / chosen.shown_file == chosen.file
    assert chosen.entry == entry_of(stage)
    config = chosen.load()
    dry_run(config, chosen.gpus, skip_files=True)
    output = capsys.readouterr().out
    assert f"{chosen.gpus} processes: " in output
    assert {"glm45v": "107,710,927,360", "glm41v": "10,292,777,472"}[model] in output
    per_rank = [float(line.split()[4]) for line in output.splitlines() if re.match(r" +\d+ +\d+\.\d\d ", line)]
    assert len(per_rank) == config.parallel.pipeline_model_parallel_size
    assert max(per_rank) < 60  # GiB, of 80 GB; the rest is for activations
    with pytest.raises(ConfigError, match=r"does not divide the \d+ processes|is not a multiple of the \d+ data-paral"):
        dry_run(config, chosen.gpus + 1 if model == "glm45v" else chosen.gpus - 1, skip_files=True)


@pytest.mark.fast
@pytest.mark.parametrize(("model", "stage"), [(m, s) for m, s in RECIPES if s != "rl"])
def test_sources_are_those_of_the_demo_and_video_comes_late(model: str, stage: str, tmp_path: Path) -> None:
    names = {source.path for source in recipe(model, stage).load().data.sources}
    assert names <= set(sources_of_the_demo(Library(tmp_path)))
    assert not [name for name in names if name.startswith("held_out")]
    assert bool([name for name in names if "video" in name]) == (stage != "pretrain")
    if stage.startswith("sft"):
        assert {"chat_think", "chat_describe", "chat_text"} <= names  # with thinking, without, and text alone


@pytest.mark.fast
@pytest.mark.parametrize("model", MINIATURES)
def test_miniature_needs_a_folder_of_its_own(model: str) -> None:
    with pytest.raises(ConfigError, match=r"train.output_dir is empty"):
        recipe(model, "pretrain").load(over=MINIATURES[model])


@pytest.mark.fast
@pytest.mark.parametrize("model", MINIATURES)
def test_reinforcement_learning_is_as_published(model: str) -> None:
    """Section 5: packs of 32K, GRPO, clip-higher, expansion and force answering, all domains; no balancing."""
    config = recipe(model, "rl").load()
    assert isinstance(config, RlConfig)
    assert config.train.seq_length == 32_768
    assert config.rl.advantage == "grpo"
    assert config.rl.clip_high > config.rl.clip_low
    assert config.expansion.enabled
    assert config.rollout.force_answer
    assert config.curriculum.sampler == "rlcs"
    assert (config.moe.balance_loss_coeff, config.moe.expert_bias_update_rate) == (0, 0)
    assert sum(source.weight for source in config.data.sources) == 100
    longest = longest_prompt(config)
    assert config.data.video_max_tokens + 2_000 <= longest
    assert config.data.image_max_tokens <= longest
    assert list(config.warnings_of_domains({"rl"})) == []


# --- miniatures -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def demo_shards(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """The demo's sources, five samples of each."""
    out = tmp_path_factory.mktemp("recipes")
    library = Library(out / "records")
    (out / "records").mkdir()
    for name, records in sources_of_the_demo(library).items():
        if not name.startswith("held_out"):
            jsonl = library.root / f"{name}.jsonl"
            jsonl.write_text("".join(json.dumps(record) + "\n" for record in islice(records, 5)), encoding="utf-8")
            assert not build_shards([jsonl], out / name, tokenizer=tokenizer_folder, name=name).counts.rejected
    return out


def trains(
    model: str,
    stage: str,
    shards: Path,
    tokenizer: Path,
    out: Path,
    *,
    init_from: Path | str = "",
    resumes: bool = True,
) -> None:
    """Train 5 steps; if it `resumes`, then steps 4 and 5 again, from the checkpoint of step 3."""
    chosen, run = recipe(model, stage), out / stage
    names = [MINIATURES[model], *(["miniature_rl"] if stage == "rl" else [])]
    arguments = [word for name in names for word in ("--config", str(CONFIGS / "tiny" / f"{name}.yaml"))]
    arguments += [f"train.output_dir={run}", f"model.init_from={init_from}"]
    arguments += [f"data.root={shards}", f"data.tokenizer={tokenizer}"]
    train(chosen.file, arguments, entry=f"{chosen.entry}.train")
    lines = metrics(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    if not resumes:
        return
    (run / "checkpoints" / "latest").write_text("step_0000003\n")
    assert "step 3 of 5" in train(chosen.file, arguments, entry=f"{chosen.entry}.train")
    kept = ("step", "loss", "grad_norm", "lr", "tokens", "samples")
    assert [[line[key] for key in kept] for line in metrics(run)] == [[line[key] for key in kept] for line in lines]


def test_miniature_of_a_recipe_for_glm45v_trains_and_resumes(
    demo_shards: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    trains("glm45v", "pretrain", demo_shards, tokenizer_folder, tmp_path)


def test_miniature_of_a_recipe_for_glm41v_trains(demo_shards: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    trains("glm41v", "long_context", demo_shards, tokenizer_folder, tmp_path, resumes=False)


@pytest.mark.slow
@pytest.mark.parametrize("model", MINIATURES)
def test_every_miniature_trains_and_resumes_from_the_stage_before(
    model: str, demo_shards: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    before = {"long_context": "pretrain", "sft": "long_context", "sft_64k": "sft", "sft_lora": "sft"}
    for stage in (stage for stage in STAGES if stage != "rl"):
        init_from = tmp_path / before[stage] if stage in before else ""
        trains(model, stage, demo_shards, tokenizer_folder, tmp_path, init_from=init_from)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "preset", "chat_form"), [("glm45v", "tiny_moe", "glm45v"), ("glm41v", "tiny_dense", "glm41v")]
)
def test_miniature_of_reinforcement_learning_learns_and_resumes(
    model: str, preset: str, chat_form: str, tmp_path: Path
) -> None:
    digits.build(tmp_path / "digits", chats=100, prompts=200, held_out=1, chat_form=chat_form)
    shards, tokenizer = tmp_path / "digits" / "shards", tmp_path / "digits" / "tokenizer"
    keys = [f"data.sources=[{{path: {shards}/chats}}]", f"data.tokenizer={tokenizer}", f"model.preset={preset}"]
    keys += ["train.steps=60", f"train.output_dir={tmp_path}/start"]
    train(CONFIGS / "tiny" / "rl_start.yaml", keys)
    trains(model, "rl", shards, tokenizer, tmp_path, init_from=tmp_path / "start")
    lines = metrics(tmp_path / "rl")
    assert sum(line["updates"] for line in lines) >= 5
    assert max(line["rollout/mismatch"] for line in lines if line["updates"]) < 1e-5
