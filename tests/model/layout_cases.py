"""What the processes of the layout tests do: train a few steps in a layout, and compare with a reference."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

import training.step
from data_pipeline.encoding.batch import Batch
from model.checkpoint import TrainState, load_checkpoint, save_checkpoint
from model.config import GlmvConfig
from model.glmv import GlmvModel, build_model_chunks
from model.hf_weights import SafetensorsFolder, load_weights, local_tensors, this_ranks_slice
from model.parallel import ParallelConfig, initialize_model_parallel
from model.weight_table import weights
from tests.model.broken_twins import broken
from tests.reference import Clip, Part, Picture, TestSample, Words, make_sample, pack, small_config
from training.optimizer import OptimizerConfig
from training.step import TrainStep

SEQ_LENGTH = 192
OPTIMIZER = OptimizerConfig(lr=1e-3, min_lr=1e-3, decay_style="constant", weight_decay=0.1, clip_grad=1.0)

# --- layouts by name --------------------------------------------------------------------------------------------------

SIZES = {
    "TP": "tensor_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "VPP": "virtual_pipeline_model_parallel_size",
    "CP": "context_parallel_size",
    "EP": "expert_model_parallel_size",
    "ETP": "expert_tensor_parallel_size",
}
UNITS = {"E": "embedding", "t": "decoder", "L": "loss"}


def layout_of(name: str) -> tuple[ParallelConfig, list[list[str]] | None]:
    """A layout by its name, such as "TP2 SP PP2 vision=tensor stages=Et|tttL". DP is what is left of the processes."""
    keys: dict[str, Any] = {}
    stages = None
    for word in name.split():
        if word == "SP":
            keys["sequence_parallel"] = True
        elif word.startswith("vision="):
            keys["vision"] = word.removeprefix("vision=")
        elif word.startswith("stages="):
            stages = [[UNITS[unit] for unit in stage] for stage in word.removeprefix("stages=").split("|")]
        elif not word.startswith("DP"):
            keys[SIZES[word.rstrip("0123456789")]] = int(word.lstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    return ParallelConfig(**keys), stages


# --- packs ------------------------------------------------------------------------------------------------------------

# Four packs a step. With two data-parallel ranks, the second has the packs without images.
MIXED: list[list[list[Part]]] = [
    [[Words(3), Picture(4, 6), Words(30)], [Words(25)], [Words(4), Clip(2, 4, 4), Words(9)]],
    [[Words(60)], [Words(17)]],
    [[Picture(8, 4), Words(20)], [Words(9), Picture(2, 2), Words(5), Picture(4, 4), Words(11)]],
    [[Words(100)], [Words(40)], [Words(5)]],
]
TEXT_ALONE: list[list[list[Part]]] = [[[Words(50)], [Words(30)]], [[Words(111)]], [[Words(9)]], [[Words(80)]]]


def samples_of_step(variant: str, step: int) -> list[list[TestSample]]:
    """The samples of each pack. The second step has no image at all."""
    config = small_config(variant)
    return [
        [
            make_sample(config, parts, seed=1000 * step + 10 * p + s, domain="image_text" if s else "text")
            for s, parts in enumerate(samples)
        ]
        for p, samples in enumerate(TEXT_ALONE if step == 2 else MIXED)
    ]


def packs_of_step(variant: str, step: int) -> list[Batch]:
    return [pack(samples, SEQ_LENGTH) for samples in samples_of_step(variant, step)]


def packs_with_neighbour(variant: str, seed: int) -> list[Batch]:
    """Two packs, each a text of domain `text` and one of domain `chat`, as long, whose content `seed` decides."""
    config = small_config(variant)
    return [
        pack(
            [
                make_sample(config, [Words(61)], seed=p, domain="text"),
                make_sample(config, [Words(61)], seed=100 * seed + p, domain="chat"),
            ],
            SEQ_LENGTH,
        )
        for p in range(2)
    ]


# --- what processes are asked to do -----------------------------------------------------------------------------------


def make_trainer(
    variant: str, folder: str, layout: str, steps: int = 1, dtype: str = "float32", balance: bool = True
) -> TrainStep:
    parallel, stages = layout_of(layout)
    initialize_model_parallel(parallel, seed=1)
    coefficients: dict[str, Any] = {"balance_loss_coeff": 0.01, "expert_bias_update_rate": 1e-3} if balance else {}
    chunks = build_model_chunks(
        small_config(variant), parallel, pipeline_layout=stages, dtype=getattr(torch, dtype), **coefficients
    )
    load_weights(chunks, SafetensorsFolder(folder))
    return TrainStep([chunk.train() for chunk in chunks], OPTIMIZER, steps, SEQ_LENGTH)


def of_this_rank(packs: Sequence[Batch]) -> Sequence[Batch]:
    return packs[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]


def train(
    variant: str,
    folder: str,
    layout: str,
    steps: Sequence[int] = (1, 2, 3),
    dtype: str = "float32",
    load_from: str = "",
    checkpoint: str = "",
    save_to: str = "",
    compare_with: str = "",
) -> dict[str, Any]:
    """Train the steps of these numbers from the weights in `folder`, or from the checkpoint `load_from`.

    Returns losses, gradient norms and other figures of each step; with `compare_with`, also the summed squares of the
    difference of every tensor, and of the tensor.
    """
    trainer = make_trainer(variant, folder, layout, steps[-1], dtype)
    chunks = trainer.model_chunks
    if load_from:
        load_checkpoint(Path(load_from), chunks, trainer.optimizer)
    reports = [vars(trainer.run(step, of_this_rank(packs_of_step(variant, step)))) for step in steps]
    trainer.synchronize_weights()
    if checkpoint:
        save_checkpoint(
            Path(checkpoint), chunks, hf_files=lambda _: None, optimizer=trainer.optimizer,
            train_state=TrainState(step=steps[-1]),
        )  # fmt: skip
    held = tensors_of(chunks)
    if save_to:
        torch.save({name: tensor.clone() for name, tensor in held.items()}, f"{save_to}.{dist.get_rank()}")
    differences = {}
    if compare_with:
        differences = differences_of(held, small_config(variant), torch.load(compare_with, weights_only=True))
    return {"reports": reports, "differences": differences}


def train_in_many_buckets(bucket_size: int, **arguments: Any) -> dict[str, Any]:
    """`train`, with gradients reduced and weights gathered in buckets of so many numbers."""
    small_buckets = partial(training.step.DistributedDataParallelConfig, bucket_size=bucket_size)
    with patch.object(training.step, "DistributedDataParallelConfig", small_buckets):
        return train(**arguments)


def groups_made(variant: str, folder: str, layout: str) -> list[Any]:
    """The groups that a process makes from the beginning to the end of a step, but those over gloo and those that only
    members make: over NCCL all processes have to make a group together, also those that are not in it."""
    made = []
    true_new_group = dist.new_group

    def new_group(ranks: Sequence[int] | None = None, **options: Any) -> Any:
        if options.get("backend") != "gloo" and not options.get("use_local_synchronization"):
            made.append(ranks and list(ranks))
        return true_new_group(ranks, **options)

    with patch.object(dist, "new_group", new_group):
        train(variant, folder, layout, steps=[1])
    return made


def losses_beside(variant: str, folder: str, layout: str, seed: int) -> dict[str, float]:
    """The loss of each domain on `packs_with_neighbour`."""
    trainer = make_trainer(variant, folder, layout)
    return trainer.run(1, of_this_rank(packs_with_neighbour(variant, seed))).domain_losses


def gradients(variant: str, folder: str, layout: str, expected: str, twin: str = "") -> dict[str, tuple[float, float]]:
    """Summed squares of the difference of every gradient of the first step from the one in `expected`, and of that
    one. With `twin`, of a model that is broken in the way of this name."""
    with broken(twin) as break_model:
        trainer = make_trainer(variant, folder, layout, balance=False)
        break_model(trainer.model_chunks)
        # Every rank is to have every gradient; the distributed optimizer would leave it a part.
        true_schedule = training.step.get_forward_backward_func
        training.step.get_forward_backward_func = lambda: partial(get_forward_backward_func(), force_all_reduce=True)
        trainer.optimizer.step = lambda: (True, 0.0, 0)
        try:
            trainer.run(1, of_this_rank(packs_of_step(variant, 1)))
        finally:
            training.step.get_forward_backward_func = true_schedule
    held = {
        name: parameter.main_grad
        for chunk in trainer.model_chunks
        for name, parameter in canonical_parameters(chunk).items()
    }
    return differences_of(held, small_config(variant), torch.load(expected, weights_only=True))


# --- comparing --------------------------------------------------------------------------------------------------------


def tensors_of(chunks: Sequence[GlmvModel]) -> dict[str, Tensor]:
    return dict(named for chunk in chunks for named in local_tensors(chunk))


def canonical_parameters(chunk: GlmvModel) -> dict[str, Any]:
    names = [name for name, _ in local_tensors(chunk) if not name.endswith("expert_bias")]
    return dict(zip(names, chunk.parameters(), strict=True))


def differences_of(
    held: dict[str, Tensor], config: GlmvConfig, reference: dict[str, Tensor]
) -> dict[str, tuple[float, float]]:
    stacked = {weight.name: weight.transform.stacked for weight in weights(config)}
    squares = {}
    for name, local in held.items():
        expected = this_ranks_slice(reference[name], local, name, stacked[name]).double()
        squares[name] = ((local.double() - expected).square().sum().item(), expected.square().sum().item())
    return squares
