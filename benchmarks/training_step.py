"""Time of a training step on one GPU: glmv-train with either backend, and transformers with torch's AdamW.

    python -m benchmarks.training_step [--preset glm41v_9b] [--layers 4] [--seq-length 8192] [--packs 2]

The models have the published widths and the whole vision tower, and as many decoder layers and experts as fit one GPU
together with their optimizer. The packs are planned by the data pipeline over synthetic samples of realistic sizes.
transformers takes the same samples one at a time, as its Trainer does, in bfloat16 with scaled_dot_product_attention.

The limit is a large bfloat16 matrix product in the same run. FLOPs are those of `model.flops`, for useful tokens only.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.table import Table

from benchmarks.image_balance import MIXTURES, synthetic_source
from benchmarks.synthetic_sources import Grid
from data_pipeline.encoding.batch import Batch, EncodedSample, collate
from data_pipeline.encoding.rope_positions import rope_positions
from data_pipeline.media.image_sizes import tokens_of
from data_pipeline.media.pixel_budget import SLICE_BYTES
from data_pipeline.plan.plan import Plan, PlanPosition
from model.backend import select_backend
from model.config import GlmvConfig
from model.flops import FORWARD_AND_BACKWARD, decoder_cost, vision_cost
from model.glmv import build_model_chunks
from model.installed import has_transformer_engine
from model.parallel import ParallelConfig
from model.process_groups import initialize_model_parallel
from training.distributed import process_group
from training.optimizer_config import OptimizerConfig
from training.pack_cost import pack_cost
from training.step import TrainStep

WARM_UP, TIMED = 3, 7  # steps
HF_CLASSES = {
    "glm4v_moe": (transformers.Glm4vMoeConfig, transformers.Glm4vMoeForConditionalGeneration),
    "glm4v": (transformers.Glm4vConfig, transformers.Glm4vForConditionalGeneration),
}
SEGMENT_MULTIPLE = 8
console = Console(width=110)


# --- data -------------------------------------------------------------------------------------------------------------


def synthetic_packs(config: GlmvConfig, seq_length: int, packs: int, steps: int) -> list[list[list[EncodedSample]]]:
    """Return the samples of every pack of every step, with random words and pixels."""
    sources = [synthetic_source(label, weight, seq_length) for label, weight in MIXTURES[seq_length].items()]
    plan = Plan(
        sources,
        seed=0,
        seq_length=seq_length,
        segment_multiple=SEGMENT_MULTIPLE,
        global_batch_size=packs,
        cost=pack_cost(config),
    )
    rng = np.random.default_rng(0)
    return [
        [
            [
                random_sample(
                    config, sources[piece.source].images[piece.row], int(sources[piece.source].lengths[piece.row]), rng
                )
                for piece in pack.pieces
            ]
            for pack in packs_of_step
        ]
        for packs_of_step, _ in islice(plan.steps(PlanPosition.start(len(sources))), steps)
    ]


def random_sample(config: GlmvConfig, grids: Sequence[Grid], length: int, rng: np.random.Generator) -> EncodedSample:
    """Return a sample of `length` tokens: images, then words."""
    ids: list[int] = []
    for grid in grids:
        image = [config.image_token_id] * tokens_of(grid)
        ids += [config.image_start_token_id, *image, config.image_end_token_id]
    ids += rng.integers(40, config.decoder.vocab_size // 2, length - len(ids)).tolist()
    input_ids = np.array(ids)
    is_image = input_ids == config.image_token_id
    patches = sum(h * w for h, w in grids)
    return EncodedSample(
        sample_id="random",
        domain="interleaved",
        input_ids=input_ids,
        loss=~is_image,
        position_ids=rope_positions(is_image, tuple(grids)),
        patches=torch.from_numpy(rng.integers(0, 256, (patches, SLICE_BYTES), dtype=np.uint8)),
        grids=tuple(grids),
        frames_per_image=(1,) * len(grids),
    )


def flops(config: GlmvConfig, samples: Sequence[EncodedSample]) -> int:
    """Return the FLOPs of a forward and a backward pass."""
    decoder, vision = decoder_cost(config.decoder), vision_cost(config.vision)
    forward = decoder.of(*map(len, samples)) + vision.of(*(h * w for one in samples for h, w in one.grids))
    return FORWARD_AND_BACKWARD * forward


# --- contenders -------------------------------------------------------------------------------------------------------

TakeStep = Callable[[int], object]


def own_steps(config: GlmvConfig, steps: Sequence[Sequence[Batch]], backend: str, seq_length: int) -> TakeStep:
    """Build the model of glmv-train; return the function that takes step `number`."""
    chunks = build_model_chunks(
        config, ParallelConfig(), dtype=torch.bfloat16, backend=select_backend(backend), balance_loss_coeff=1e-4
    )
    with torch.no_grad():
        for name, parameter in chunks[0].named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0, 0.02)
    trainer = TrainStep([chunk.train() for chunk in chunks], OptimizerConfig(lr=1e-5), len(steps), seq_length)
    return lambda number: trainer.run(number + 1, steps[number])


def transformers_steps(config: GlmvConfig, steps: Sequence[Sequence[EncodedSample]]) -> TakeStep:
    """Build transformers' model; return the function that takes step `number`."""
    content = config.to_hf()
    content.pop("architectures")
    config_class, model_class = HF_CLASSES[config.variant]
    with torch.device("cuda"):
        hf_config = config_class(**content, attn_implementation="sdpa", dtype="bfloat16")
        model = model_class._from_config(hf_config, dtype=torch.bfloat16).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def take(number: int) -> None:
        samples = steps[number]
        for sample in samples:
            input_ids = torch.from_numpy(sample.input_ids)[None].cuda()
            images = {}
            if sample.grids:
                channels = sample.patches.cuda().float().view(-1, SLICE_BYTES // 3, 3).transpose(1, 2)
                both_frames = channels[:, :, None].expand(-1, -1, 2, -1)
                images = {
                    "pixel_values": (both_frames.flatten(1) / 255).bfloat16(),
                    "image_grid_thw": torch.tensor([(1, h, w) for h, w in sample.grids]).cuda(),
                    "mm_token_type_ids": (input_ids == config.image_token_id).int(),
                }
            labels = torch.where(input_ids == config.image_token_id, -100, input_ids)
            (model(input_ids=input_ids, labels=labels, **images).loss / len(samples)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return take


# --- timing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timed:
    """The figures of one contender."""

    seconds: float  # per step, the median
    rate: float  # tokens per second
    flops: float  # per second
    gigabytes: float  # peak memory


def timed(make: Callable[[], TakeStep], tokens: Sequence[int], work: Sequence[int]) -> Timed:
    """Time a contender.

    Args:
        make: Builds its model.
        tokens: Of each step.
        work: FLOPs of each step.
    """
    gc.collect()
    torch.cuda.empty_cache()  # memory of the contender before
    torch.cuda.reset_peak_memory_stats()
    take, seconds = make(), list[float]()
    for number in range(WARM_UP + TIMED):
        torch.cuda.synchronize()
        began = time.perf_counter()
        take(number)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    whole = sum(seconds[WARM_UP:])
    return Timed(
        statistics.median(seconds[WARM_UP:]),
        sum(tokens[WARM_UP:]) / whole,
        sum(work[WARM_UP:]) / whole,
        torch.cuda.max_memory_allocated() / 1e9,
    )


def matrix_product_flops(size: int = 8192, repeats: int = 20) -> float:
    """Return the FLOPs per second of a large bfloat16 matrix product."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        F.linear(a, b)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        F.linear(a, b)
    torch.cuda.synchronize()
    return repeats * 2 * size**3 / (time.perf_counter() - began)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="glm41v_9b", choices=("glm41v_9b", "glm45v"))
    parser.add_argument("--layers", type=int, default=4, help="layers of the decoder")
    parser.add_argument("--experts", type=int, default=16, help="experts of each MoE layer of glm45v")
    parser.add_argument("--seq-length", type=int, default=8192, choices=tuple(MIXTURES))
    parser.add_argument("--packs", type=int, default=2, help="packs per step")
    options = parser.parse_args()
    if not torch.accelerator.is_available():
        raise SystemExit("error: this benchmark needs a GPU")

    whole = GlmvConfig.from_preset(options.preset)
    smaller = {"num_hidden_layers": options.layers}
    if whole.decoder.is_moe:
        smaller["n_routed_experts"] = options.experts
    config = replace(whole, decoder=replace(whole.decoder, **smaller))
    steps = synthetic_packs(config, options.seq_length, options.packs, WARM_UP + TIMED)
    samples = [[sample for pack in step for sample in pack] for step in steps]
    batches = [
        [collate(pack, seq_length=options.seq_length, segment_multiple=SEGMENT_MULTIPLE, pad_id=0) for pack in step]
        for step in steps
    ]
    tokens = [sum(map(len, step)) for step in samples]
    work = [flops(config, step) for step in samples]

    contenders: dict[str, Callable[[], TakeStep]] = {
        "transformers, one sample at a time": partial(transformers_steps, config, samples)
    }
    for backend in ("torch", "transformer_engine") if has_transformer_engine() else ("torch",):
        contenders[f"glmv-train, {backend}"] = partial(own_steps, config, batches, backend, options.seq_length)
    with process_group():
        initialize_model_parallel(ParallelConfig(), seed=1)
        limit = matrix_product_flops()
        title = (
            f"{options.preset}, {options.layers} decoder layers, {options.packs} packs of {options.seq_length} tokens "
            f"({sum(map(len, samples)) / len(samples):.0f} samples per step), {torch.cuda.get_device_name()}"
        )
        table = Table("", "ms per step", "tokens/s", "ratio", "TFLOP/s", "of the limit", "GB", title=title)
        baseline = 0.0
        for name, make in contenders.items():
            try:
                result = timed(make, tokens, work)
            except torch.OutOfMemoryError:
                table.add_row(name, "out of memory")
                continue
            baseline = baseline or result.rate
            table.add_row(
                name,
                f"{1e3 * result.seconds:.0f}",
                f"{result.rate:,.0f}",
                f"{result.rate / baseline:.1f}",
                f"{result.flops / 1e12:.0f}",
                f"{result.flops / limit:.0%}",
                f"{result.gigabytes:.0f}",
            )
        table.add_row("limit: one matrix product", "", "", "", f"{limit / 1e12:.0f}", "100%", "")
        console.print(table)


if __name__ == "__main__":
    main()
