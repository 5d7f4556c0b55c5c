"""Wrong settings of FP8 are refused at start, with the key and the fix; right ones are described."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.config import ConfigError
from model.fp8 import Fp8Config
from model.fp8_rules import Gpu, check_gpu
from training.config import RunConfig, load_config
from training.dry_run import dry_run
from training.loop import run
from training.setup import prepare

pytestmark = pytest.mark.fast

BF16 = "train.precision=bf16"
TP2 = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]
TP4 = ["parallel.tensor_model_parallel_size=4", "parallel.sequence_parallel=true"]
TP8 = ["parallel.tensor_model_parallel_size=8", "parallel.sequence_parallel=true"]
LARGE = ["model.preset=glm45v", "train.global_batch_size=64", BF16]

WRONG = [
    # processes, recipe, other overrides, message
    (1, "bogus", [], r"fp8.recipe='bogus': choose one of none, tensorwise, delayed, blockwise, mxfp8"),
    (1, "custom", [], r"fp8.recipe='custom': choose one of"),
    (1, "tensorwise", ["fp8.format=e5m2"], r"fp8.format='e5m2': choose one of auto, hybrid, e4m3"),
    (1, "tensorwise", ["fp8.first_last_layers_bf16=-1"], r"fp8.first_last_layers_bf16=-1: give 0 or more layers"),
    (1, "tensorwise", ["fp8.first_last_layers_bf16=yes"], r"fp8.first_last_layers_bf16"),
    (1, "tensorwise", ["fp8.router=true"], r"unknown key 'fp8.router': .* recipe, format, first_last_layers_bf16"),
    (1, "delayed", ["fp8.first_last_layers_bf16=1"], r"delayed scales the whole decoder .* or fp8.recipe=tensorwise"),
    (1, "delayed", [BF16, "fp8.param_gather=true"], r"param_gather=true is supported with fp8.recipe=tensorwise or"),
    (
        1,
        "mxfp8",
        [BF16, "fp8.param_gather=true"],
        r"param_gather=true is supported .*, not with mxfp8; set it to false",
    ),
    (1, "delayed", [BF16, "train.check_determinism=2"], r"check_determinism=2 computes a step twice; set it to 0"),
    (1, "delayed", [BF16, "train.deterministic=true"], r"train.deterministic=true forbids it; set fp8.recipe=tensor"),
    (1, "delayed", [BF16, "recompute.decoder=selective"], r"recompute.decoder=selective does; set it to full or none"),
    (
        1,
        "delayed",
        [BF16, "recompute.vision=selective", "fp8.vision=true"],
        r"recompute.vision=selective does; set it to full or none, or fp8.recipe=tensorwise",
    ),
    (1, "tensorwise", [], r"fp8.recipe=tensorwise needs train.precision=bf16 .*, or model.backend=torch to emulate"),
    (1, "tensorwise", ["model.backend=transformer_engine"], r"model.backend=transformer_engine needs a GPU"),
    (1, "tensorwise", ["model.backend=torch", "fp8.param_gather=true"], r"which the torch backend does not; set it to"),
    (1, "blockwise", ["model.backend=torch", "fp8.first_last_layers_bf16=2"], r"leaves none of the 4 decoder layers"),
    (1, "tensorwise", [BF16, "fp8.first_last_layers_bf16=2"], r"set it below 2, or fp8.recipe=none"),
    (
        32,
        "tensorwise",
        [*LARGE, "parallel.pipeline_model_parallel_size=16", "fp8.first_last_layers_bf16=3"],
        r"is more than the 2 layers of a pipeline stage .*; set it to that number, or below",
    ),
    (
        1,
        "tensorwise",
        [BF16, "fp8.param_gather=true", "lora.rank=4"],
        r"keeps only FP8 of weights that lora.rank=4 freezes; set it to false",
    ),
    (1, "tensorwise", [BF16, "fp8.param_gather=true", "freeze=[decoder]"], r"freeze names decoder; set it to false"),
    (
        1,
        "tensorwise",
        [BF16, "fp8.param_gather=true", "fp8.vision=true", "freeze=[vision]"],
        r"frozen weights, and freeze names vision; set it to false",
    ),
    (
        1,
        "blockwise",
        [BF16, "fp8.param_gather=true", "optimizer.exp_avg_dtype=bf16"],
        r"needs main weights and moments in float32; set optimizer.exp_avg_dtype and exp_avg_sq_dtype to fp32",
    ),
    (
        1,
        "blockwise",
        [BF16, "fp8.param_gather=true", "optimizer.offload_fraction=0.5"],
        r"fp8.param_gather=true and optimizer.offload_fraction=0.5 exclude each other",
    ),
    (
        8,
        "tensorwise",
        [*LARGE, *TP8],
        r"multiples of 16, and language_model.decoder.layers.0.mlp.linear_fc2.weight is 4096 x 1368 there; set a "
        r"smaller parallel.tensor_model_parallel_size \(now 8\) or fp8.first_last_layers_bf16=1",
    ),
    (
        8,
        "mxfp8",
        [*LARGE, "parallel.expert_tensor_parallel_size=8"],
        r"multiples of 32, and .*experts.* is .*176.* there; set a smaller parallel.expert_tensor_parallel_size "
        r"\(now 8\) or another fp8.recipe",
    ),
    (4, "mxfp8", [BF16, *TP4], r"multiples of 32, and .*layers.0.mlp.linear_fc2.weight is 128 x 80 there"),
    (4, "tensorwise", [BF16, *TP4], r"multiples of 16, and .*shared_experts.* is 128 x 24 there"),
    (
        4,
        "tensorwise",
        [BF16, "model.preset=tiny_dense", *TP4, "parallel.vision=tensor", "fp8.vision=true"],
        r"vision_model.blocks.layers.0.self_attention.linear_qkv.weight is 72 x 96 there; set a smaller .* or "
        r"fp8.vision=false",
    ),
    (
        1,
        "tensorwise",
        [BF16, "train.seq_length=264"],
        r"train.seq_length=264 must be a multiple of 16 .* set it to 256",
    ),
    (1, "mxfp8", [BF16, "train.seq_length=272"], r"train.seq_length=272 must be a multiple of 32 .* set it to 256"),
    (2, "delayed", [BF16, *TP2, "train.seq_length=272"], r"train.seq_length=272 must be a multiple of 32 with fp8"),
    (
        2,
        "tensorwise",
        [BF16, "parallel.context_parallel_size=2", "train.seq_length=272"],
        r"train.seq_length=272 must be a multiple of 32 .*, so that the tokens of every tensor and context rank",
    ),
    (
        2,
        "blockwise",
        [BF16, *TP2, "train.seq_length=384"],
        r"seq_length=384 must be a multiple of 256 .* set it to 256",
    ),
]


def checked(config_file: Path, processes: int, recipe: str, overrides: list[str]) -> RunConfig:
    config = load_config(RunConfig, config_file, [f"fp8.recipe={recipe}", *overrides])
    prepare(config, processes)
    return config


@pytest.mark.parametrize(("processes", "recipe", "overrides", "message"), WRONG)
def test_wrong_setting_is_answered_with_the_key_and_the_fix(
    config_file: Path, tmp_path: Path, processes: int, recipe: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        checked(config_file, processes, recipe, overrides)
    assert not (tmp_path / "run").exists()


HOPPER, ADA, AMPERE, BLACKWELL, CONSUMER = (9, 0), (8, 9), (8, 0), (10, 0), (12, 0)
MACHINES = [
    # recipe, capability, CUDA, message or None where the recipe runs
    ("tensorwise", AMPERE, (12, 9), r"tensorwise needs a GPU of compute capability 8.9, and this one has 8.0; set fp8"),
    ("delayed", AMPERE, (12, 9), r"delayed needs a GPU of compute capability 8.9, and this one has 8.0; .*=none"),
    (
        "tensorwise",
        ADA,
        (12, 0),
        r"a torch built with CUDA 12.1 or above, and this one has 12.0; install another torch",
    ),
    ("blockwise", ADA, (12, 9), r"blockwise needs a GPU of compute capability 9.0, .*; set fp8.recipe=tensorwise"),
    ("blockwise", HOPPER, (12, 8), r"CUDA 12.9 or above, and this one has 12.8; .* or set fp8.recipe=tensorwise"),
    ("mxfp8", HOPPER, (13, 0), r"capability 10.0 and below 12.0, and this one has 9.0; set fp8.recipe=blockwise"),
    ("mxfp8", CONSUMER, (13, 0), r"capability 10.0 and below 12.0, and this one has 12.0"),
    ("tensorwise", ADA, (12, 4), None),
    ("delayed", HOPPER, (12, 1), None),
    ("blockwise", HOPPER, (13, 0), None),
    ("mxfp8", BLACKWELL, (12, 8), None),
]


@pytest.mark.parametrize(("recipe", "capability", "cuda", "message"), MACHINES)
def test_machine_has_the_kernels_or_is_refused(
    recipe: str, capability: tuple[int, int], cuda: tuple[int, int], message: str | None
) -> None:
    fp8, found = Fp8Config(recipe=recipe), Gpu(capability, cuda)
    if message is None:
        check_gpu(fp8, found)
    else:
        with pytest.raises(ConfigError, match=message):
            check_gpu(fp8, found)


def test_gpu_without_transformer_engine_is_refused(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The torch backend, which `auto` takes there, would emulate FP8: slower than bf16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = load_config(RunConfig, config_file, ["fp8.recipe=tensorwise", BF16])
    with pytest.raises(
        ConfigError, match=r"needs Transformer Engine, which is not installed here .* model.backend=torch"
    ):
        run(config)
    assert not (tmp_path / "run").exists()


RIGHT = [
    (1, "tensorwise", [BF16]),
    (8, "mxfp8", [*LARGE, "parallel.expert_tensor_parallel_size=4"]),  # 1,408 over 4 is 352, a multiple of 32
    (1, "delayed", [BF16, "recompute.decoder=full"]),
    (1, "blockwise", [BF16, "fp8.param_gather=true", "fp8.vision=true"]),
    (1, "mxfp8", [BF16, "fp8.format=hybrid", "fp8.first_last_layers_bf16=1"]),
    (2, "blockwise", [BF16, *TP2, "train.seq_length=512"]),
    (2, "tensorwise", ["model.preset=glm41v_9b", BF16, *TP2]),
    (8, "blockwise", [*LARGE, *TP8, "fp8.first_last_layers_bf16=1", "train.seq_length=1024"]),
]


@pytest.mark.parametrize(("processes", "recipe", "overrides"), RIGHT)
def test_right_setting_is_planned_and_described(
    config_file: Path, processes: int, recipe: str, overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(RunConfig, config_file, [f"fp8.recipe={recipe}", *overrides])
    dry_run(config, processes, skip_files=True)
    printed = capsys.readouterr().out
    assert f"fp8: {recipe}, {config.fp8.number_format}, Transformer Engine's kernels" in printed
    assert "FP8 kernels were not run on a GPU before this version" in printed


def test_share_of_weights_in_fp8(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 4 layers the first, which is dense, and the last stay in bf16. Counted by hand for tiny_moe."""
    options = ["fp8.recipe=tensorwise", BF16, "fp8.first_last_layers_bf16=1"]
    dry_run(load_config(RunConfig, config_file, options), 1, skip_files=True)
    attention = 128 * (8 + 4 + 4) * 32 + 8 * 32 * 128
    experts = (8 + 1) * 3 * 128 * 96
    layer = attention + experts + (8 + 4 + 4) * 32 + 2 * 128  # biases of q, k and v; norms
    dense = layer - experts + 3 * 128 * 320
    whole = 2 * 2048 * 128 + dense + 3 * layer + 128
    printed = capsys.readouterr().out
    assert f"decoder {2 * (attention + experts) / whole:.1%}, router 0.0%, vision 0.0%, adapter 0.0%" in printed
    assert "; decoder layers 1 to 2 of 0 to 3" in printed


def test_keys_without_a_recipe_are_named(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dry_run(load_config(RunConfig, config_file, ["fp8.vision=true"]), 1, skip_files=True)
    assert "fp8.vision has no effect, because fp8.recipe is none" in capsys.readouterr().out
