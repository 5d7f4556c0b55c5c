"""What a wrong configuration says: one line that names the option and the mend, before any process group or file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist
from omegaconf import OmegaConf

from data_pipeline.errors import DataError
from model.checkpoint import CheckpointError
from model.config import ConfigError
from sft.train import SftConfig
from training.config import MoeConfig, RunConfig, load_config
from training.loop import run
from training.start_point import find_start_point

pytestmark = pytest.mark.fast


@pytest.fixture(autouse=True)
def no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is refused here is refused before the processes join."""
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: pytest.fail("a process group was started"))


def attempt(config_file: Path, *overrides: str, schema: type[RunConfig] = RunConfig) -> None:
    run(load_config(schema, config_file, overrides))


MESSAGES = [
    # one override, what the message must name
    ("train.stepz=3", r"unknown key 'train.stepz'; the nearest known one is 'train.steps'"),
    ("optimiser.lr=1", r"unknown key 'optimiser'; the nearest known one is 'optimizer'"),
    ("data.sources=[{path: x, wieght: 2}]", r"unknown key 'data.sources.wieght'.*'data.sources.weight'"),
    ("parallel.pipelines=2", r"unknown key 'parallel.pipelines'"),
    ("parallel.pipeline_model_parallel_size=2", r"pipeline_model_parallel_size=2 does not divide the 1 processes"),
    ("parallel.virtual_pipeline_model_parallel_size=2", r"needs parallel.pipeline_model_parallel_size above 1"),
    ("parallel.vision=half", r"parallel.vision='half': choose one of images, tensor"),
    ("optimizer.lr=fast", r"optimizer.lr: .*'fast'"),
    ("optimizer.min_lr=1", r"optimizer.min_lr=1.0 must be between 0 and optimizer.lr"),
    ("optimizer.warmup_steps=6", r"optimizer.warmup_steps=6 must be below train.steps=6"),
    ("train.steps=0", r"train.steps=0: give a positive number"),
    ("train.micro_batch_size=2", r"train.micro_batch_size=2: .*set it to 1"),
    ("train.precision=fp16", r"train.precision='fp16': choose one of fp32, bf16"),
    ("train.seq_length=100", r"train.seq_length=100 must be a multiple of data.segment_multiple=8"),
    ("train.output_dir=", r"train.output_dir is empty"),
    ("checkpoint.resume=always", r"checkpoint.resume='always': choose one of auto, never"),
    ("fp8.recipe=blockwise", r"fp8.recipe=blockwise needs .*Transformer Engine.*set fp8.recipe=none"),
    ("fp8.recipe=e4m3", r"fp8.recipe='e4m3': choose one of"),
    ("model.preset=", r"model.preset and model.init_from are both empty"),
    ("model.preset=glm5v", r"model.preset='glm5v' is unknown; choose one of: .*tiny_moe"),
    ("model.backend=transformer_engine", r"model.backend=transformer_engine needs .*; or set model.backend=auto"),
    ("model.backend=te", r"model.backend='te': choose one of auto, transformer_engine, torch"),
    ("parallel.sequence_parallel=true", r"set parallel.tensor_model_parallel_size above 1, or sequence_parallel=false"),
    ("parallel.tensor_model_parallel_size=2", r"tensor_model_parallel_size=2 does not divide the 1 processes"),
    ("parallel.expert_model_parallel_size=3", r"expert_model_parallel_size=3 does not divide the 1 processes"),
    ("parallel.expert_model_parallel_size=0", r"expert_model_parallel_size=0 must be at least 1"),
    ("optimizer.lr_scale.vision=0", r"optimizer.lr_scale.vision=0.0 must be positive .* use freeze"),
    ("optimizer.lr_scale.tower=2", r"unknown key 'optimizer.lr_scale.tower'; the nearest known one is"),
    ("recompute.decoder=some", r"recompute.decoder='some': choose one of none, selective, full"),
    ("freeze=[visoin]", r"freeze names 'visoin': choose from vision, adapter, decoder"),
    ("freeze=[vision,vision]", r"freeze names 'vision' twice"),
    ("freeze=[decoder,vision,adapter]", r"freeze=.* leaves nothing to train"),
    ("noequals", r"'noequals' is not an override; write dotted.key=value"),
]


@pytest.mark.parametrize(("override", "message"), MESSAGES, ids=[o for o, _ in MESSAGES])
def test_a_wrong_value_is_named(config_file: Path, tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attempt(config_file, override)
    assert not (tmp_path / "run").exists()


LAYOUTS = [
    # world size, overrides, message
    (2, ["parallel.tensor_model_parallel_size=2"], r"needs parallel.sequence_parallel=true"),
    (3, [], r"train.global_batch_size=4 is not a multiple of the 3 data-parallel ranks"),
    (2, ["model.preset=tiny_dense", "parallel.expert_model_parallel_size=2"], r"this model is dense; set it to 1"),
    (16, ["parallel.tensor_model_parallel_size=16", "parallel.sequence_parallel=true"],
     r"tensor_model_parallel_size=16 does not divide the model's num_attention_heads 8"),
    (16, ["parallel.expert_model_parallel_size=16", "train.global_batch_size=16"],
     r"expert_model_parallel_size=16 does not divide the model's number of experts 8"),
    (4, ["parallel.expert_tensor_parallel_size=64"], r"expert_tensor_parallel_size=64 does not divide the 4 processes"),
    (8, ["parallel.context_parallel_size=8"],
     r"context_parallel_size=8 cuts every segment into 16 .*data.segment_multiple=8 .*set it to a multiple of 16"),
    (2, ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2",
         "train.global_batch_size=3"], r"groups of .*pipeline_model_parallel_size=2, and a data-parallel rank has 3"),
    (7, ["parallel.pipeline_model_parallel_size=7", "train.global_batch_size=7"],
     r"pipeline_model_parallel_size=7 leaves ranks without work: the model has 4 decoder layers"),
    (8, ["parallel.tensor_model_parallel_size=8", "parallel.sequence_parallel=true", "model.preset=tiny_dense"],
     r"tensor_model_parallel_size=8 does not divide the model's num_key_value_heads 4"),
]  # fmt: skip


@pytest.mark.parametrize(("world_size", "overrides", "message"), LAYOUTS)
def test_a_layout_that_cannot_be_right_is_refused(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, world_size: int, overrides: list[str], message: str
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    with pytest.raises(ConfigError, match=message):
        attempt(config_file, *overrides)


def test_a_missing_file_and_broken_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        load_config(RunConfig, tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("train: [")
    with pytest.raises(ConfigError, match=r"not valid YAML"):
        load_config(RunConfig, tmp_path / "broken.yaml")


def test_the_values_of_file_and_command_line_arrive(config_file: Path) -> None:
    config = load_config(RunConfig, config_file, ["optimizer.lr=3e-4", "data.num_workers=0"])
    assert config.optimizer.lr == 3e-4
    assert config.data.num_workers == 0
    assert config.train.seq_length == 128
    assert [Path(source.path).name for source in config.data.sources] == ["pictures", "text", "clips"]


def test_fine_tuning_needs_a_model_to_start_from(config_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.init_from is empty"):
        attempt(config_file, schema=SftConfig)
    assert load_config(SftConfig, config_file, ["model.init_from=x"]).optimizer.weight_decay == 0.0


def test_a_missing_shard_is_named(config_file: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere"):
        attempt(config_file, f"data.sources=[{{path: {tmp_path}/nowhere}}]")


def test_another_tokenizer_is_refused(config_file: Path) -> None:
    """The published model's token ids against the demo tokenizer's."""
    with pytest.raises(ConfigError, match=r"<\|image\|> has id 34, but the model's configuration says 151363"):
        attempt(config_file, "model.preset=glm45v")


def test_a_folder_that_is_no_model_is_refused(config_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a checkpoint, nor a run's folder with one"):
        attempt(config_file, f"model.init_from={tmp_path}")
    other = tmp_path / "llama"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConfigError, match=r"model_type 'llama' is not a GLM-V model; accepted: glm4v_moe"):
        attempt(config_file, f"model.init_from={other}", "model.preset=")


def finished_run(config_file: Path, folder: Path, *overrides: str) -> None:
    """A run's folder as a crash leaves it, with a checkpoint of step 3."""
    config = load_config(RunConfig, config_file, overrides)
    step = folder / "checkpoints" / "step_0000003"
    step.mkdir(parents=True)
    (folder / "checkpoints" / "latest").write_text("step_0000003\n")
    (folder / "metrics.jsonl").write_text('{"step": 3}\n')
    (folder / "config.yaml").write_text("")
    resolved = OmegaConf.to_container(OmegaConf.structured(config))
    (step / "train_state.json").write_text(json.dumps({"step": 3, "data": {}, "config": resolved}))


CHANGES = [
    ("train.global_batch_size=8", "train.global_batch_size was 4 .* and is 8 now"),
    ("data.seed=5", "data.seed was 0 .* and is 5 now"),
    ("data.image_max_tokens=25", "data.image_max_tokens was 16"),
    ("model.preset=tiny_dense", "model.preset was 'tiny_moe'"),
]


@pytest.mark.parametrize(("override", "message"), CHANGES)
def test_a_changed_plan_is_named_on_resume(config_file: Path, tmp_path: Path, override: str, message: str) -> None:
    finished_run(config_file, tmp_path / "run")
    with pytest.raises(ConfigError, match=message + r".*checkpoint.allow_changes=true"):
        attempt(config_file, override)


def test_of_a_changed_list_what_differs_is_named(config_file: Path, tmp_path: Path) -> None:
    finished_run(config_file, tmp_path / "run")
    content = OmegaConf.load(config_file)
    content.data.sources[1].weight = 2
    OmegaConf.save(content, config_file)
    with pytest.raises(ConfigError, match=r"^data\.sources\[1\]\.weight was 1\.0 in the run at .* and is 2\.0 now"):
        attempt(config_file)


@pytest.mark.parametrize("override", ["freeze=[vision]", "freeze=[adapter,decoder]"])
def test_another_freeze_is_another_run(config_file: Path, tmp_path: Path, override: str) -> None:
    """Also where changes are allowed: the optimizer's state of what was frozen does not exist."""
    finished_run(config_file, tmp_path / "run", "freeze=[adapter]")
    message = rf"freeze was \['adapter'\] in the run at .* and is .* now.*model.init_from={tmp_path}/run"
    for overrides in ([], ["checkpoint.allow_changes=true"]):
        with pytest.raises(ConfigError, match=message):
            attempt(config_file, override, *overrides)


def test_the_order_of_frozen_parts_does_not_matter(config_file: Path, tmp_path: Path) -> None:
    finished_run(config_file, tmp_path / "run", "freeze=[adapter,vision]")
    config = load_config(RunConfig, config_file, ["freeze=[vision,adapter]"])
    assert find_start_point(config, OmegaConf.to_container(OmegaConf.structured(config))).resume  # type: ignore[arg-type]


def test_the_experts_of_a_frozen_decoder_are_not_balanced(config_file: Path) -> None:
    trained, frozen = (load_config(RunConfig, config_file, [f"freeze=[{part}]"]) for part in ("vision", "decoder"))
    assert trained.balancing == trained.moe
    assert frozen.balancing == MoeConfig(balance_loss_coeff=0.0, expert_bias_update_rate=0.0)


def test_fewer_steps_than_done_are_refused(config_file: Path, tmp_path: Path) -> None:
    finished_run(config_file, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"train.steps=2 is below step 3, which the run at .* has reached"):
        attempt(config_file, "train.steps=2", "optimizer.warmup_steps=1")


@pytest.mark.parametrize("name", ["config.json", "state"])
def test_the_folder_of_a_model_is_not_written_into(config_file: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"is the folder of a model, not of a run; choose another"):
        attempt(config_file)


@pytest.mark.parametrize("override", ["data.sources=[{path: ", "train=3", "data.sources=foo"])
def test_an_override_that_cannot_be_read_is_one_line(config_file: Path, override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        attempt(config_file, override)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "picture.yaml").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ConfigError, match=r"picture.yaml is not valid YAML"):
        load_config(RunConfig, tmp_path / "picture.yaml")


def test_an_output_folder_that_cannot_be_written(config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"train.output_dir=.* cannot be written: .*/file is not a folder"):
        attempt(config_file, f"train.output_dir={tmp_path}/file/run")


def test_a_run_continues_without_the_model_it_started_from(config_file: Path, tmp_path: Path) -> None:
    """What `model.init_from` names may have been archived meanwhile."""
    finished_run(config_file, tmp_path / "run")
    config = load_config(RunConfig, config_file)
    origin = find_start_point(config, OmegaConf.to_container(OmegaConf.structured(config)))  # type: ignore[arg-type]
    assert origin.resume == tmp_path / "run" / "checkpoints" / "step_0000003"
    assert origin.weights is None


def test_resume_never_does_not_touch_a_run(config_file: Path, tmp_path: Path) -> None:
    finished_run(config_file, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"holds a run and checkpoint.resume=never; choose another folder"):
        attempt(config_file, "checkpoint.resume=never")


def test_a_checkpoint_that_latest_names_but_is_not_there(config_file: Path, tmp_path: Path) -> None:
    finished_run(config_file, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_0000003")
    with pytest.raises(CheckpointError, match=r"latest names 'step_0000003', which is not there"):
        attempt(config_file)
