"""Time of forward and backward of one pack on one CPU core: glmv-train's torch backend and transformers.

    python -m benchmarks.forward_backward [--shapes small_moe dense] [--rounds 8]

Both start from the same weights and take the same pack in float32, transformers with scaled_dot_product_attention and
all experts in one grouped matrix product. Their losses must be equal. They alternate, and the fastest round of each
counts, because other programs can only slow a round down. glmv-train's time includes its schedule, the gradient buffers
of its data parallelism, and the reduction of its losses; no optimizer is part of either time.

The limit is a large matrix product in the same run. FLOPs are those of `model.flops`, for useful tokens only.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from megatron.core.pipeline_parallel import get_forward_backward_func
from rich.console import Console
from rich.table import Table

from benchmarks.synthetic_sources import Grid
from benchmarks.training_step import HF_CLASSES, SEGMENT_MULTIPLE, flops, random_sample
from data_pipeline.encoding.batch import Batch, EncodedSample, collate
from data_pipeline.media.pixel_budget import SLICE_BYTES
from model.config import DecoderConfig, GlmvConfig
from model.glmv import GlmvModel
from model.image_constants import PIXEL_MEAN, PIXEL_STD
from model.parallel import ParallelConfig
from model.process_groups import initialize_model_parallel
from model.weights.load import SafetensorsFolder, load_weights
from training.distributed import process_group
from training.optimizer_config import OptimizerConfig
from training.step import TrainStep, forward_step

WORDS = 8192  # of the vocabulary
console = Console(width=110)


@dataclass(frozen=True)
class Shape:
    """A model and the samples of its pack."""

    preset: str
    decoder: dict[str, Any]  # sizes that differ from the preset
    lengths: tuple[int, ...]  # tokens of each sample
    image: Grid | None = None  # in the first sample


def widths(hidden: int, experts: int, chosen: int) -> dict[str, Any]:
    """Return the sizes of a decoder with experts, in the proportions of GLM-4.5V."""
    return {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "head_dim": 32,
        "num_attention_heads": hidden // 16,
        "num_key_value_heads": 2,
        "moe_intermediate_size": hidden // 2,
        "n_routed_experts": experts,
        "num_experts_per_tok": chosen,
    }


SHAPES = {
    "256 wide, 16 experts": Shape("tiny_moe", widths(256, 16, 4), (300, 150, 50)),
    "256 wide, 64 experts, image": Shape("tiny_moe", widths(256, 64, 8), (300, 150, 50), image=(20, 20)),
    "512 wide, 64 experts": Shape("tiny_moe", widths(512, 64, 8), (300, 150, 50)),
    "512 wide, dense": Shape(
        "tiny_dense",
        {
            "hidden_size": 512,
            "intermediate_size": 1600,
            "head_dim": 32,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
        },
        (300, 150, 50),
    ),
}


def config_of(shape: Shape) -> GlmvConfig:
    """Return the configuration of a shape's model."""
    preset = GlmvConfig.from_preset(shape.preset)
    decoder: DecoderConfig = replace(preset.decoder, vocab_size=WORDS, **shape.decoder)
    return replace(preset, decoder=decoder, vision=replace(preset.vision, out_hidden_size=decoder.hidden_size, depth=3))


def samples_of(shape: Shape, config: GlmvConfig) -> list[EncodedSample]:
    """Return the samples of a shape's pack."""
    rng = np.random.default_rng(0)
    images = [[shape.image] if shape.image and not number else [] for number in range(len(shape.lengths))]
    return [random_sample(config, grids, length, rng) for grids, length in zip(images, shape.lengths, strict=True)]


# --- contenders -------------------------------------------------------------------------------------------------------

Compute = Callable[[], float]  # forward and backward; returns the mean loss


def of_transformers(config: GlmvConfig, samples: list[EncodedSample], batch: Batch, folder: Path) -> Compute:
    """Build transformers' model, and save it to `folder`; return its forward and backward."""
    content = config.to_hf()
    content.pop("architectures")
    config_class, model_class = HF_CLASSES[config.variant]
    torch.manual_seed(1)
    if config.decoder.is_moe:
        content["experts_implementation"] = "grouped_mm"
    model = model_class(config_class(**content, attn_implementation="sdpa")).float().train()
    with torch.no_grad():  # transformers leaves the routers' weights at zero
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.normal_(0, config.decoder.initializer_range)
    model.save_pretrained(folder)
    inputs = packed_inputs(config, samples, batch)

    def compute() -> float:
        model.zero_grad(set_to_none=True)
        loss = model(**inputs).loss
        loss.backward()
        return loss.item()

    return compute


def packed_inputs(config: GlmvConfig, samples: list[EncodedSample], batch: Batch) -> dict[str, Any]:
    """Return the pack as transformers takes it: positions of words tell it where each segment begins."""
    bounds = batch.cu_seqlens.tolist()
    words = torch.cat([torch.arange(end - begin) for begin, end in pairwise(bounds)])
    # Labels are moved by one place inside transformers, and here the batch has moved them already.
    labels = torch.where(batch.loss_mask > 0, batch.labels, -100).roll(1)
    input_ids = batch.input_ids[None]
    inputs: dict[str, Any] = {
        "input_ids": input_ids,
        "labels": labels[None],
        "position_ids": torch.cat([words[None, None], batch.position_ids[:, None]]),
        "use_cache": False,
    }
    grids = [grid for sample in samples for grid in sample.grids]
    if grids:
        channels = batch.patches.float().view(-1, SLICE_BYTES // 3, 3).transpose(1, 2) / 255
        normalised = (channels - torch.tensor(PIXEL_MEAN)[:, None]) / torch.tensor(PIXEL_STD)[:, None]
        inputs |= {
            "pixel_values": normalised[:, :, None].expand(-1, -1, 2, -1).flatten(1),
            "image_grid_thw": torch.tensor([(1, h, w) for h, w in grids]),
            "mm_token_type_ids": (input_ids == config.image_token_id).int(),
        }
    return inputs


def of_glmv_train(config: GlmvConfig, batch: Batch, folder: Path) -> Compute:
    """Build the model of glmv-train with the weights in `folder`; return its forward and backward."""
    model = GlmvModel(config, ParallelConfig()).train()
    load_weights([model], SafetensorsFolder(folder))
    trainer = TrainStep([model], OptimizerConfig(), steps=100, seq_length=batch.input_ids.numel())
    tokens = batch.num_loss_tokens
    step = partial(forward_step, loss_scale=1 / tokens)

    def compute() -> float:
        for ddp in trainer.ddp:
            ddp.zero_grad_buffer()
        trainer.optimizer.zero_grad()
        (report,) = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter([(batch, None)])],
            model=trainer.ddp,
            num_microbatches=1,
            seq_length=batch.input_ids.numel(),
            micro_batch_size=1,
            forward_only=False,
        )
        return report["domains"].sum(0)[0].item() / tokens

    return compute


# --- timing -----------------------------------------------------------------------------------------------------------


def seconds(work: Callable[[], object]) -> float:
    """Return the CPU time of a piece of work on this thread and those that it starts."""
    began = time.process_time()
    work()
    return time.process_time() - began


def matrix_product_flops(size: int = 2048, repeats: int = 3) -> float:
    """Return the FLOPs per second of a large float32 matrix product."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / min(seconds(partial(torch.mm, a, b)) for _ in range(repeats))


def measure(name: str, rounds: int, table: Table) -> None:
    """Add the rows of one shape to the table."""
    shape = SHAPES[name]
    config = config_of(shape)
    samples = samples_of(shape, config)
    length = -(-sum(shape.lengths) // 64) * 64
    batch = collate(samples, seq_length=length, segment_multiple=SEGMENT_MULTIPLE, pad_id=0)
    with tempfile.TemporaryDirectory() as folder:
        contenders = {
            "transformers, grouped_mm": of_transformers(config, samples, batch, Path(folder)),
            "glmv-train, torch": of_glmv_train(config, batch, Path(folder)),
        }
    losses = [compute() for compute in contenders.values()]
    if abs(losses[0] - losses[1]) > 1e-5 * losses[0]:
        raise SystemExit(f"error: {name}: the losses differ: {losses}")
    times: dict[str, list[float]] = {contender: [] for contender in contenders}
    limits = []
    for _ in range(rounds):
        limits.append(matrix_product_flops())
        for contender, compute in contenders.items():
            times[contender].append(seconds(compute))
    baseline = min(next(iter(times.values())))
    for contender, measured in times.items():
        best = min(measured)
        share = flops(config, samples) / best / max(limits)
        table.add_row(name, contender, f"{1e3 * best:.0f}", f"{baseline / best:.2f}", f"{share:.0%}")
        name = ""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    table = Table("model", "", "ms of CPU", "ratio", "of the limit", title="forward and backward of one pack, fp32")
    with process_group():
        initialize_model_parallel(ParallelConfig(), seed=1)
        for name in options.shapes:
            measure(name, options.rounds, table)
    console.print(table)


if __name__ == "__main__":
    main()
