"""A wrong configuration is answered in one line that names the key and the fix, before any process group or file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch.distributed as dist

from data_pipeline.errors import DataError
from model.config import ConfigError
from sft.train import SftConfig
from training.config import MoeConfig, RunConfig, load_config
from training.loop import run
from training.setup import prepare

pytestmark = pytest.mark.fast


@pytest.fixture(autouse=True)
def no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if the processes join: every refusal comes before that."""
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: pytest.fail("a process group was started"))


def attempt(config_file: Path, *overrides: str, schema: type[RunConfig] = RunConfig) -> None:
    run(load_config(schema, config_file, overrides))


MESSAGES = [
    # override, message
    ("train.stepz=3", r"unknown key 'train.stepz': did you mean train.steps\? The keys of train are steps, global_"),
    ("train.lr=3", r"unknown key 'train.lr': did you mean optimizer.lr\? The keys of train are"),
    ("lr=3", r"unknown key 'lr': did you mean optimizer.lr\?$"),
    ("train.warmup=3", r"unknown key 'train.warmup': did you mean optimizer.warmup_steps\?"),
    ("data.batch_size=3", r"'data.batch_size': did you mean train.global_batch_size or train.micro_batch_size\? The"),
    ("foo=1", r"^unknown key 'foo'$"),
    ("foo.lr=1", r"^unknown key 'foo.lr': did you mean optimizer.lr\?$"),
    ("optimiser.lr=1", r"^unknown key 'optimiser': did you mean optimizer\?$"),
    ("data.sources=[{path: x, wieght: 2}]", r"'data.sources\[\].wieght': did you mean data.sources\[\].weight\?"),
    ("parallel.pipelines=2", r"unknown key 'parallel.pipelines': The keys of parallel are tensor_model_parallel_size"),
    ("parallel.pipeline_model_parallel_size=2", r"pipeline_model_parallel_size=2 does not divide the 1 processes"),
    ("parallel.virtual_pipeline_model_parallel_size=2", r"needs parallel.pipeline_model_parallel_size above 1"),
    ("parallel.vision=half", r"parallel.vision='half': choose one of images, tensor"),
    ("optimizer.lr=fast", r"optimizer.lr: .*'fast'"),
    ("optimizer.lr=0", r"optimizer.lr=0.0: give a positive number"),
    ("optimizer.lr=nan", r"optimizer.lr=nan: give a positive number"),
    ("optimizer.eps=0", r"optimizer.eps=0.0: give a positive number"),
    ("optimizer.beta2=nan", r"optimizer.beta2=nan: give a number from 0 to below 1"),
    ("optimizer.weight_decay=nan", r"optimizer.weight_decay=nan: give 0 or a positive number"),
    ("optimizer.weight_decay=inf", r"optimizer.weight_decay=inf: give 0 or a positive number"),
    ("optimizer.clip_grad=inf", r"optimizer.clip_grad=inf: give 0 or a positive number"),
    ("optimizer.clip_grad=-1", r"optimizer.clip_grad=-1.0: give 0 or a positive number"),
    ("moe.balance_loss_coeff=nan", r"moe.balance_loss_coeff=nan: give 0 or a positive number"),
    ("moe.expert_bias_update_rate=inf", r"moe.expert_bias_update_rate=inf: give 0 or a positive number"),
    ("moe.dispatcher=deepep", r"moe.dispatcher='deepep': choose one of alltoall, flex"),
    ("moe.dispatcher=flex", r"moe.dispatcher=flex sends tokens in bf16; set train.precision=bf16, or dispatcher=allto"),
    ("moe.shared_expert_overlap=true", r"nothing to overlap with; set parallel.expert_model_parallel_size above 1, or"),
    ("train.gc_interval=-1", r"train.gc_interval=-1: give 0 or a positive number"),
    ("metrics.peak_tflops=-1", r"metrics.peak_tflops=-1.0: give 0 or a positive number"),
    ("metrics.dead_expert_steps=0", r"metrics.dead_expert_steps=0: give a positive number"),
    ("metrics.wandb=glm", r"metrics.wandb=glm needs the package wandb: pip install -c constraints.txt -e '.\[wandb\]'"),
    (
        "metrics.mlflow=sqlite:///x",
        r"metrics.mlflow=sqlite:///x needs the package mlflow: pip install .*, or leave metrics",
    ),
    ("metrics.mlflow=runs/mlflow", r"metrics.mlflow=runs/mlflow is a folder, .* give a database, sqlite:///"),
    ("profile.start=7", r"profile.start=7 is after the last step, train.steps=6: lower it"),
    ("profile={start: 1, ranks: []}", r"profile.ranks is empty: name the ranks to profile, or set profile.start=0"),
    ("profile={start: 1, ranks: [0, 1]}", r"profile.ranks names 1: 1 processes have ranks 0 to 0"),
    ("model.rope_theta=-1", r"model.rope_theta=-1.0: give 0 or a positive number"),
    ("model.max_position_embeddings=-1", r"model.max_position_embeddings=-1: give 0 or a positive number"),
    ("train.seed=-1", r"train.seed=-1: give a number from 0 to"),
    ("train.seed=9223372036854775808", r"train.seed=9223372036854775808: give a number from 0 to"),
    ("data.seed=-1", r"data.seed=-1: give a number from 0 to"),
    ("optimizer.min_lr=1", r"optimizer.min_lr=1.0 must be between 0 and optimizer.lr"),
    ("optimizer.warmup_steps=6", r"optimizer.warmup_steps=6 must be below train.steps=6"),
    ("train.steps=0", r"train.steps=0: give a positive number"),
    ("train.micro_batch_size=2", r"train.micro_batch_size=2: .*set it to 1"),
    ("train.precision=fp16", r"train.precision='fp16': choose one of fp32, bf16"),
    ("train.seq_length=100", r"train.seq_length=100 must be a multiple of data.segment_multiple=8"),
    ("train.output_dir=", r"train.output_dir is empty"),
    ("checkpoint.resume=always", r"checkpoint.resume='always': choose one of auto, never"),
    ("checkpoint.keep_every=1000", r"keep_every=1000 is not a multiple of checkpoint.save_interval=3: most of these"),
    ("checkpoint.keep_every=-3", r"checkpoint.keep_every=-3: give 0 or a positive number"),
    ("checkpoint.verify=none", r"checkpoint.verify='none': choose one of full, sizes"),
    ("fp8.recipe=e4m3", r"fp8.recipe='e4m3': choose one of"),
    ("model.preset=", r"model.preset and model.init_from are both empty"),
    ("model.preset=glm5v", r"model.preset='glm5v' is unknown; choose one of: .*tiny_moe"),
    ("model.backend=transformer_engine", r"model.backend=transformer_engine needs .*; or set model.backend=auto"),
    ("model.backend=te", r"model.backend='te': choose one of auto, transformer_engine, torch"),
    ("parallel.sequence_parallel=true", r"set parallel.tensor_model_parallel_size above 1, or sequence_parallel=false"),
    ("parallel.tensor_model_parallel_size=2", r"tensor_model_parallel_size=2 does not divide the 1 processes"),
    ("parallel.expert_model_parallel_size=3", r"expert_model_parallel_size=3 does not divide the 1 processes"),
    ("parallel.expert_model_parallel_size=0", r"expert_model_parallel_size=0 must be at least 1"),
    ("checkpoint.keep_every=3", r"checkpoint.keep_every=3 has no effect, because checkpoint.keep_last=0 keeps every"),
    ("optimizer.decay_style=WSD", r"optimizer.decay_style='WSD': choose one of cosine, linear, constant, wsd"),
    ("optimizer.decay_style=wsd", r"decay_style=wsd needs optimizer.cooldown_steps"),
    ("optimizer.cooldown_steps=2", r"cooldown_steps=2 belongs to optimizer.decay_style=wsd, and the style is cosine"),
    ("optimizer.main_grads=bf16", r"optimizer.main_grads=bf16 with train.precision=fp32"),
    ("optimizer.exp_avg_dtype=bf16", r"exp_avg_sq_dtype below fp32 need train.precision=bf16"),
    ("optimizer.exp_avg_dtype=fp8", r"optimizer.exp_avg_dtype='fp8': choose one of fp32, bf16, fp16"),
    ("optimizer.offload_fraction=2", r"optimizer.offload_fraction=2.0: give a number from 0 to 1"),
    ("optimizer.lr_scale.vision=0", r"optimizer.lr_scale.vision=0.0 must be positive .* use freeze"),
    ("optimizer.lr_scale.tower=2", r"unknown key 'optimizer.lr_scale.tower': The keys of .* vision, adapter, decoder"),
    ("freeze=vision", r"freeze='vision': give a list, freeze=\[...\]"),
    ("train=3", r"train is 3: give its keys, each with a value"),
    ("train.deterministic=2", r"train.deterministic=2: give true or false"),
    ("recompute.decoder=some", r"recompute.decoder='some': choose one of none, selective, full"),
    ("freeze=[visoin]", r"freeze names 'visoin': choose from vision, adapter, decoder, router"),
    ("freeze=[vision,vision]", r"freeze names 'vision' twice"),
    ("freeze=[decoder,router]", r"the routers are frozen with the decoder; remove router"),
    ("freeze=[decoder,vision,adapter]", r"freeze=.* leaves nothing to train"),
    ("noequals", r"'noequals' is not an override; write dotted.key=value"),
]


@pytest.mark.parametrize(("override", "message"), MESSAGES, ids=[o for o, _ in MESSAGES])
def test_wrong_value_is_answered_with_the_key_and_the_fix(
    config_file: Path, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        attempt(config_file, override)
    assert not (tmp_path / "run").exists()


SEQUENCE_PARALLEL = "parallel.sequence_parallel=true"
EP2 = "parallel.expert_model_parallel_size=2"
FLEX = ["train.precision=bf16", "moe.dispatcher=flex"]
OVERLAP = "moe.shared_expert_overlap=true"
LAYOUTS = [
    # world size, overrides, message
    (2, ["parallel.tensor_model_parallel_size=2"], r"needs parallel.sequence_parallel=true"),
    (3, [], r"train.global_batch_size=4 is not a multiple of the 3 data-parallel ranks"),
    (2, ["model.preset=tiny_dense", "parallel.expert_model_parallel_size=2"], r"this model is dense; set it to 1"),
    (
        16,
        ["parallel.tensor_model_parallel_size=16", SEQUENCE_PARALLEL],
        r"tensor_model_parallel_size=16 does not divide the model's num_attention_heads 8",
    ),
    (
        16,
        ["parallel.expert_model_parallel_size=16", "train.global_batch_size=16"],
        r"expert_model_parallel_size=16 does not divide the model's number of experts 8",
    ),
    (4, ["parallel.expert_tensor_parallel_size=64"], r"expert_tensor_parallel_size=64 does not divide the 4 processes"),
    (
        8,
        ["parallel.context_parallel_size=8"],
        r"context_parallel_size=8 cuts every segment into 16 .*data.segment_multiple=8 .*set it to a multiple of 16",
    ),
    (
        2,
        [
            "parallel.pipeline_model_parallel_size=2",
            "parallel.virtual_pipeline_model_parallel_size=2",
            "train.global_batch_size=3",
        ],
        r"groups of .*pipeline_model_parallel_size=2, and a data-parallel rank has 3",
    ),
    (
        7,
        ["parallel.pipeline_model_parallel_size=7", "train.global_batch_size=7"],
        r"pipeline_model_parallel_size=7 leaves ranks without work: the model has 4 decoder layers",
    ),
    (
        8,
        ["parallel.tensor_model_parallel_size=8", SEQUENCE_PARALLEL],
        r"tensor_model_parallel_size=8 does not divide the model's num_key_value_heads 4",
    ),
    (2, ["model.preset=tiny_dense", OVERLAP], r"^moe.shared_expert_overlap=true: this model is dense and has no exp"),
    (2, [EP2, *FLEX, OVERLAP], r"belongs to moe.dispatcher=alltoall, and the dispatcher is flex; set shared_expert_"),
    (2, [EP2, OVERLAP, "lora.rank=4"], r"overlap=true is not supported with adapters; set it to false, or lora.rank=0"),
    (2, ["model.preset=tiny_dense", *FLEX], r"^moe.dispatcher=flex: this model is dense and has no experts; remove it"),
    (2, FLEX, r"DeepEP has no settings for parallel.expert_model_parallel_size=1; choose one of 2, 4, 8, .*alltoall$"),
    (4, [EP2, "parallel.expert_tensor_parallel_size=2", *FLEX], r"set parallel.expert_tensor_parallel_size=1, or disp"),
    (2, [EP2, *FLEX, "train.deterministic=true"], r"same bits twice; set train.deterministic=false, or dispatcher=al"),
    (
        2,
        [EP2, *FLEX],
        r"flex needs a GPU and the package deep_ep \(DeepEP\), missing here; install it, or set disp",
    ),
]


@pytest.mark.parametrize(("world_size", "overrides", "message"), LAYOUTS)
def test_layout_that_cannot_be_right_is_refused(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, world_size: int, overrides: list[str], message: str
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    with pytest.raises(ConfigError, match=message):
        attempt(config_file, *overrides)


def test_missing_file_and_broken_yaml_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        load_config(RunConfig, tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("train: [")
    with pytest.raises(ConfigError, match=r"not valid YAML"):
        load_config(RunConfig, tmp_path / "broken.yaml")


@pytest.mark.parametrize("content", ["5", "true"])
def test_file_without_keys_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "number.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"number\.yaml cannot be read: it holds no keys"):
        load_config(RunConfig, tmp_path / "number.yaml")


def test_overrides_replace_values_of_the_file(config_file: Path) -> None:
    config = load_config(RunConfig, config_file, ["optimizer.lr=3e-4", "data.num_workers=0"])
    assert config.optimizer.lr == 3e-4
    assert config.data.num_workers == 0
    assert config.train.seq_length == 128
    assert [Path(source.path).name for source in config.data.sources] == ["images", "text", "videos"]


def test_fine_tuning_requires_init_from(config_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.init_from is empty"):
        attempt(config_file, schema=SftConfig)
    assert load_config(SftConfig, config_file, ["model.init_from=x"]).optimizer.weight_decay == 0.0


def test_missing_shard_folder_is_reported(config_file: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere"):
        attempt(config_file, f"data.sources=[{{path: {tmp_path}/nowhere}}]")


def test_tokenizer_with_other_ids_is_refused(config_file: Path) -> None:
    """The published model's token ids against the demo tokenizer's."""
    with pytest.raises(ConfigError, match=r"<\|image\|> has id 34, but the model's configuration says 151363"):
        attempt(config_file, "model.preset=glm45v")


def test_init_from_folder_without_a_model_is_refused(config_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a checkpoint, nor a run's folder with one"):
        attempt(config_file, f"model.init_from={tmp_path}")
    other = tmp_path / "llama"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConfigError, match=r"model_type 'llama' is not a GLM-V model; accepted: glm4v_moe"):
        attempt(config_file, f"model.init_from={other}", "model.preset=")


def test_frozen_decoder_turns_off_expert_balancing(config_file: Path) -> None:
    none = MoeConfig(balance_loss_coeff=0.0, expert_bias_update_rate=0.0)
    for part, expected in {"vision": MoeConfig(), "decoder": none, "router": none}.items():
        assert load_config(RunConfig, config_file, [f"freeze=[{part}]"]).moe_in_effect == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.offload_fraction=0.5"], r"optimizer.offload_fraction=0.5: there is no GPU to offload from"),
        (
            ["train.precision=bf16", "optimizer.exp_avg_sq_dtype=bf16"],
            r"below fp32 need Transformer Engine's FusedAdam, which is not in use here",
        ),
        (["freeze=[router]", "model.preset=tiny_dense"], r"freeze names router, but the model is dense"),
        (
            ["optimizer.decay_style=wsd", "optimizer.cooldown_steps=5"],
            r"warmup_steps=2 and optimizer.cooldown_steps=5 are together more than train.steps=6",
        ),
    ],
)
def test_options_that_do_not_fit_machine_model_or_length_are_refused(
    config_file: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(load_config(RunConfig, config_file, overrides))


@pytest.mark.parametrize("override", ["data.sources=[{path: ", "train=3", "data.sources=foo"])
def test_unreadable_override_is_reported_in_one_line(config_file: Path, override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        attempt(config_file, override)
    assert "\n" not in str(caught.value)


def test_binary_file_as_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "image.yaml").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ConfigError, match=r"image.yaml is not valid YAML"):
        load_config(RunConfig, tmp_path / "image.yaml")


def test_unknown_stage_is_refused(config_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.stage='dpo': choose one of pretrain, long_context, sft, rl"):
        load_config(RunConfig, config_file, ["train.stage=dpo"])
