"""What a run measures: parts of the gradient norm, loads by modality, FLOPs, times, tokens in all."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.flops import vision_cost
from model.glmv import GlmvModel
from model.lora import add_adapters
from model.lora_config import LoraConfig
from model.moe import MODALITIES
from model.parts import freeze
from tests.launch import metrics, train
from tests.model.layout_cases import OPTIMIZER, SEQ_LENGTH, packs_of_step, samples_of_step
from tests.reference import Element, Image, Text, forward_inputs, make_sample, pack, transformers_loss
from tests.training.test_parts import part_of_transformers
from training.metrics import duration, step_line
from training.step import TrainStep
from training.throughput import StepFlops, peak_of

# --- gradient norms and expert loads ----------------------------------------------------------------------------------


def test_norms_of_the_parts_are_those_of_transformers(build: Callable[..., GlmvModel], reference: nn.Module) -> None:
    model = build().train()
    variant = model.glmv_config.variant
    report = TrainStep([model], OPTIMIZER, steps=1, seq_length=SEQ_LENGTH).run(1, packs_of_step(variant, 1))
    transformers_loss(reference, chain(*samples_of_step(variant, 1))).backward()
    squares: dict[str, float] = defaultdict(float)
    for name, parameter in reference.named_parameters():
        if parameter.grad is not None:
            squares[part_of_transformers(name)] += parameter.grad.double().square().sum().item()
    assert report.part_norms == pytest.approx({part: math.sqrt(square) for part, square in squares.items()}, rel=1e-5)
    assert sum(norm**2 for norm in report.part_norms.values()) == pytest.approx(report.grad_norm**2, rel=1e-6)


@pytest.mark.parametrize("hf_folder", ["glm4v_moe"], indirect=True)
def test_loads_by_modality_are_those_of_the_tokens(hf_folder: object, build: Callable[..., GlmvModel]) -> None:
    """Tokens are counted one by one, by the experts that the routers chose and transformers' types of the tokens."""
    model = build().train()
    chosen: list[Tensor] = []
    for router in model.routers():
        router.register_forward_hook(lambda module, inputs, outputs: chosen.append(outputs[1]))
    trainer = TrainStep([model], OPTIMIZER, steps=1, seq_length=SEQ_LENGTH)
    report = trainer.run(1, packs_of_step("glm4v_moe", 1)).moe
    layers = len(model.routers())
    counts = torch.zeros(layers, 3, 8)
    for number, (samples, batch) in enumerate(
        zip(samples_of_step("glm4v_moe", 1), packs_of_step("glm4v_moe", 1), strict=True)
    ):
        for sample, begin in zip(samples, batch.cu_seqlens.tolist(), strict=False):
            for offset, kind in enumerate(sample.mm_token_type_ids.tolist()):
                for layer in range(layers):
                    counts[layer, kind] += chosen[number * layers + layer][begin + offset].float()
    for kind, name in enumerate(("text", "image", "video")):
        share = (counts[:, kind] / counts[:, kind].mean(1, keepdim=True)).max().item()
        assert report[f"expert_load/{name}/max"] == pytest.approx(share), name
    of_all = counts.sum(1)
    assert report["expert_load/max"] == pytest.approx((of_all / of_all.mean(1, keepdim=True)).max().item())
    assert report["dead_experts"] == (of_all == 0).sum()


@pytest.mark.parametrize("hf_folder", ["glm4v_moe"], indirect=True)
def test_experts_without_tokens_are_counted_over_steps(hf_folder: object, build: Callable[..., GlmvModel]) -> None:
    """Two experts of the first router are never chosen, whatever the token."""
    model = build(expert_bias_update_rate=0.0).train()
    model.routers()[0].expert_bias[[1, 5]] = -1e6
    trainer = TrainStep([model], OPTIMIZER, steps=3, seq_length=SEQ_LENGTH)
    trainer.expert_load.dead_after = 3
    reports = [trainer.run(step, packs_of_step("glm4v_moe", 1)).moe for step in (1, 2, 3)]
    assert all(report["dead_experts"] >= 2 for report in reports)
    assert [report["dead_experts/window"] for report in reports][:2] == [0, 0]
    assert reports[2]["dead_experts/window"] >= 2
    state = trainer.expert_load.state()
    first = min(state, key=int)
    assert state[first][1] == state[first][5] == 3
    again = TrainStep([model], OPTIMIZER, steps=3, seq_length=SEQ_LENGTH)
    again.expert_load.load_state(state)
    assert again.expert_load.state() == state


# --- FLOPs ------------------------------------------------------------------------------------------------------------

FREEZES: list[list[str]] = [[], ["vision"], ["adapter"], ["decoder"], ["vision", "adapter"], ["vision", "decoder"]]


@pytest.mark.parametrize("frozen", FREEZES, ids=str)
def test_flops_of_a_step_are_those_that_torch_counts(build: Callable[..., GlmvModel], frozen: list[str]) -> None:
    """Two images and a text. torch also counts the position table, and the half of attention that the mask hides."""
    model = build().train()
    vision, decoder = model.glmv_config.vision, model.glmv_config.decoder
    contents: list[list[Element]] = [[Text(2), Image(16, 16), Image(12, 12), Text(6)], [Text(40)]]
    samples = [make_sample(model.glmv_config, elements, seed=n) for n, elements in enumerate(contents)]
    batch = pack(samples, seq_length=sum(len(sample.encoded) for sample in samples), segment_multiple=1)
    freeze(model, frozen)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(**forward_inputs(batch)).sum().backward()

    side, patches, trains = vision.position_grid, 16 * 16 + 12 * 12, "vision" not in frozen
    table = sum(2 * n * side * (side + n) * vision.hidden_size for n in (16, 12))
    squares = sum(len(sample.encoded) ** 2 for sample in samples)
    hidden_half = 2 * decoder.num_attention_heads * decoder.head_dim * squares * decoder.num_hidden_layers
    extra = table * (1 + trains) + 3 * hidden_half
    # Gradients that nothing needs: of pixels, and of the adapter's input where the tower is frozen.
    extra -= 2 * 1176 * vision.hidden_size * patches * trains
    if not trains and "adapter" not in frozen:
        extra -= 2 * vision.out_hidden_size**2 * patches // 4
    if decoder.is_moe:  # counting tokens by modality; megatron-core computes the gradient of frozen routers too
        products = 2 * len(batch.input_ids) * decoder.n_routed_experts * len(model.routers())
        extra += products * (len(MODALITIES) + decoder.hidden_size * ("decoder" in frozen))
    assert StepFlops(model.glmv_config, frozen).of([batch]) == counter.get_total_flops() - extra


@pytest.mark.parametrize("hf_folder", ["glm4v"], indirect=True)
def test_flops_with_adapters_are_those_that_torch_counts_less_the_adapters(
    hf_folder: object, build: Callable[..., GlmvModel]
) -> None:
    """What the adapters cost grows with their rank, so the counts of two ranks tell that of rank 0."""
    config = build().glmv_config
    decoder, text = config.decoder, make_sample(config, [Text(40)], seed=0)
    batch = pack([text], seq_length=40, segment_multiple=1)
    counts = []
    for rank in (1, 2):
        model = build().train()
        add_adapters(model, LoraConfig(rank=rank, targets=["language_model.*"]))
        counter = FlopCounterMode(display=False)
        with counter, sdpa_kernel(SDPBackend.MATH):
            model(**forward_inputs(batch)).sum().backward()
        counts.append(counter.get_total_flops())
    q = decoder.num_attention_heads * decoder.head_dim
    hidden_half = 3 * 2 * q * 40**2 * decoder.num_hidden_layers
    side = config.vision.position_grid
    black_image = vision_cost(config.vision).of(4)  # computed where a pack has no image, with its position table
    black_image += 2 * 2 * side * (side + 2) * config.vision.hidden_size
    counted = 2 * counts[0] - counts[1] - hidden_half - black_image
    assert StepFlops(config, [], {"decoder"}).of([batch]) == counted


def test_peaks_are_found_by_the_name_of_the_device() -> None:
    names = "NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB", "NVIDIA H200", "NVIDIA H20", "CPU"
    assert [peak_of(name) for name in names] == [989.4, 756.5, 311.9, 989.4, 148.0, 0.0]


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_lines_of_a_run_hold_what_a_trainer_reads(config_file: Path, tmp_path: Path) -> None:
    options = ["train.steps=3", "optimizer.warmup_steps=1", "metrics.peak_tflops=0.25", "checkpoint.save_interval=0"]
    stages = "parallel.pipeline_model_parallel_size=2"
    output = train(config_file, [*options, stages, f"train.output_dir={tmp_path}/run"])
    lines = metrics(tmp_path / "run")
    total = 0
    for line in lines:
        total += line["tokens"]
        assert line["tokens_total"] == total
        assert line["tokens"] == sum(value for key, value in line.items() if key in DOMAIN_TOKENS)
        assert line["mfu"] == pytest.approx(line["tflops_per_rank"] / 0.25)
        parts = {part: line[f"seconds/{part}"] for part in ("vision", "decoder", "communication", "optimizer")}
        assert all(0 < seconds < line["step_seconds"] for seconds in parts.values()), parts
        assert 0 <= line["data_seconds"] < line["step_seconds"]
        assert 0.1 < line["memory_gb"] < 20
        squares = sum(line[f"grad_norm/{part}"] ** 2 for part in ("vision", "adapter", "decoder", "router"))
        assert squares == pytest.approx(line["grad_norm"] ** 2, rel=1e-5)
    assert lines[0]["eta_seconds"] > lines[-1]["eta_seconds"] == 0
    last = step_line(lines[-1], 3)
    assert last in output
    for word in ("loss", "grad_norm", "lr", "tokens/s", "MFU", "memory", "data", "ETA"):
        assert word in last


DOMAIN_TOKENS = ("tokens/image_text", "tokens/text", "tokens/video")


def test_unknown_device_has_no_mfu_and_says_so_once(config_file: Path, tmp_path: Path) -> None:
    options = ["train.steps=2", "optimizer.warmup_steps=1", "checkpoint.save_interval=0", "freeze=[vision,decoder]"]
    output = train(config_file, [*options, f"train.output_dir={tmp_path}/run"], processes=1)
    assert output.count("metrics.peak_tflops") == 1
    for line in metrics(tmp_path / "run"):
        assert "mfu" not in line
        assert line["tflops_per_rank"] > 0
        assert [key for key in line if key.startswith("grad_norm/")] == ["grad_norm/adapter"]


@pytest.mark.fast
def test_times_are_shown_in_two_units() -> None:
    seconds = (0.2, 42.4, 100, 3600, 7300, 200_000)
    assert [duration(s) for s in seconds] == ["0 s", "42 s", "1 min 40 s", "1 h", "2 h 1 min", "2 d 7 h"]
