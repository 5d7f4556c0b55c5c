"""Functions that the processes of the layout tests run: train in a layout, and compare with a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

import model.linear_cross_entropy
import training.step
from data_pipeline.encoding.batch import Batch
from model.checkpoint import TrainState, load_checkpoint, save_checkpoint
from model.config import GlmvConfig
from model.errors import ImageTokenError
from model.fp8 import Fp8Config
from model.fp8_scales import gather_scales
from model.glmv import GlmvModel, build_model_chunks
from model.linear import GroupedLinear
from model.parallel import ParallelConfig
from model.process_groups import initialize_model_parallel
from model.weights.load import SafetensorsFolder, load_weights, local_tensors, this_ranks_part
from model.weights.table import weights
from tests.model.broken_variants import broken
from tests.model.gathers import bytes_of_weights, recorded_gathers
from tests.reference import (
    Element,
    Image,
    TestSample,
    Text,
    Video,
    make_sample,
    pack,
    small_config,
)
from training.optimizer_config import OptimizerConfig
from training.step import TrainStep

SEQ_LENGTH = 192
LOGITS_AT_ONCE = SEQ_LENGTH * 50  # the output layer works on parts of the vocabulary, as on one of full size
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
    """Parse the name of a layout, such as "TP2 SP PP2 vision=tensor stages=Et|tttL"; DP is only for the reader."""
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

# Four packs per step. With two data-parallel ranks, the second one has the packs without images.
MIXED: list[list[list[Element]]] = [
    [
        [Text(3), Image(4, 6), Text(30)],
        [Text(25)],
        [Text(4), Video(2, 4, 4), Text(9)],
    ],
    [[Text(60)], [Text(17)]],
    [
        [Image(8, 4), Text(20)],
        [Text(9), Image(2, 2), Text(5), Image(4, 4), Text(11)],
    ],
    [[Text(100)], [Text(40)], [Text(5)]],
]
TEXT_ALONE: list[list[list[Element]]] = [
    [[Text(50)], [Text(30)]],
    [[Text(111)]],
    [[Text(9)]],
    [[Text(80)]],
]


def samples_of_step(variant: str, step: int) -> list[list[TestSample]]:
    """Return the samples of each pack of a step. The second step has no image at all."""
    config = small_config(variant)
    return [
        [
            make_sample(config, elements, seed=1000 * step + 10 * p + s, domain="image_text" if s else "text")
            for s, elements in enumerate(samples)
        ]
        for p, samples in enumerate(TEXT_ALONE if step == 2 else MIXED)
    ]


def packs_of_step(variant: str, step: int) -> list[Batch]:
    return [pack(samples, SEQ_LENGTH) for samples in samples_of_step(variant, step)]


def packs_with_neighbour(variant: str, seed: int) -> list[Batch]:
    """Return two packs, each of a text of domain `text` and one of domain `chat`; `seed` changes only the latter."""
    config = small_config(variant)
    return [
        pack(
            [
                make_sample(config, [Text(61)], seed=p, domain="text"),
                make_sample(config, [Text(61)], seed=100 * seed + p, domain="chat"),
            ],
            SEQ_LENGTH,
        )
        for p in range(2)
    ]


# --- what the processes run -------------------------------------------------------------------------------------------


def make_trainer(
    variant: str,
    folder: str,
    layout: str,
    steps: int = 1,
    dtype: str = "float32",
    balance: bool = True,
    fp8: str = "none",
) -> TrainStep:
    """Build the model in a layout, with the weights in `folder`, and everything that trains it.

    Args:
        variant: Of the tiny model.
        folder: Of Hugging Face.
        layout: Its name.
        steps: Length of the run.
        dtype: Of the weights.
        balance: Whether experts are balanced.
        fp8: The recipe of all linear layers, the tower's too.
    """
    parallel, stages = layout_of(layout)
    model.linear_cross_entropy.LOGITS_AT_ONCE = LOGITS_AT_ONCE
    initialize_model_parallel(parallel, seed=1)
    coefficients: dict[str, Any] = {"balance_loss_coeff": 0.01, "expert_bias_update_rate": 1e-3} if balance else {}
    chunks = build_model_chunks(
        small_config(variant),
        parallel,
        pipeline_layout=stages,
        dtype=getattr(torch, dtype),
        fp8=Fp8Config(recipe=fp8, vision=fp8 != "none"),
        **coefficients,
    )
    load_weights(chunks, SafetensorsFolder(folder))
    return TrainStep([chunk.train() for chunk in chunks], OPTIMIZER, steps, SEQ_LENGTH)


def of_this_rank(packs: Sequence[Any]) -> Sequence[Any]:
    """Return the packs of this data-parallel rank, or what belongs to them."""
    return packs[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]


def train(
    variant: str,
    folder: str,
    layout: str,
    steps: Sequence[int] = (1, 2, 3),
    dtype: str = "float32",
    fp8: str = "none",
    load_from: str = "",
    checkpoint: str = "",
    save_to: str = "",
    compare_with: str = "",
) -> dict[str, Any]:
    """Train the given steps from the weights in `folder`, or from the checkpoint `load_from`.

    Returns:
        The report of each step, and the scales of FP8 recipe delayed. With `compare_with`, for every tensor the summed
        squares of its difference and of the tensor itself.
    """
    trainer = make_trainer(variant, folder, layout, steps[-1], dtype, fp8=fp8)
    chunks = trainer.model_chunks
    if load_from:
        load_checkpoint(Path(load_from), chunks, trainer.optimizer)
    reports = [vars(trainer.run(step, of_this_rank(packs_of_step(variant, step)))) for step in steps]
    trainer.synchronize_weights()
    if checkpoint:
        save_checkpoint(
            Path(checkpoint),
            chunks,
            hf_files=lambda _: None,
            optimizer=trainer.optimizer,
            train_state=TrainState(step=steps[-1]),
        )
    held = tensors_of(chunks)
    if save_to:
        torch.save({name: tensor.clone() for name, tensor in held.items()}, f"{save_to}.{dist.get_rank()}")
    differences = {}
    if compare_with:
        differences = differences_of(held, small_config(variant), torch.load(compare_with, weights_only=True))
    return {"reports": reports, "differences": differences, "scales": gather_scales(chunks)}


def save_before_updates(variant: str, folder: str, layout: str, checkpoint: str) -> dict[str, Any]:
    """Save the weights in `folder` and an optimizer that has not updated them; then train, and return the report."""
    trainer = make_trainer(variant, folder, layout, 6)
    state = TrainState(step=0)
    chunks, optimizer = trainer.model_chunks, trainer.optimizer
    save_checkpoint(Path(checkpoint), chunks, hf_files=lambda _: None, optimizer=optimizer, train_state=state)
    return vars(trainer.run(1, of_this_rank(packs_of_step(variant, 1))))


def train_in_many_buckets(bucket_size: int, **arguments: Any) -> dict[str, Any]:
    """Train with gradients reduced and weights gathered in buckets of `bucket_size` numbers."""
    small_buckets = partial(training.step.DistributedDataParallelConfig, bucket_size=bucket_size)
    with patch.object(training.step, "DistributedDataParallelConfig", small_buckets):
        return train(**arguments)


def train_with_unmarked_experts(**arguments: Any) -> dict[str, Any]:
    """Train with expert layers that do not mark their weights, as those of Transformer Engine 2.13 and later."""
    true_init = GroupedLinear.__init__

    def init_and_unmark(self: Any, *args: Any, **kwargs: Any) -> None:
        true_init(self, *args, **kwargs)
        for parameter in self.parameters():
            del parameter.tensor_model_parallel

    with patch.object(GroupedLinear, "__init__", init_and_unmark):
        return train(**arguments)


def gathers_of_the_second_step(variant: str, folder: str, layout: str) -> tuple[int, list[int | str]]:
    """Take two steps; return the bytes of this rank's weights, and when the second step gathers how many of them."""
    trainer = make_trainer(variant, folder, layout, steps=2)
    trainer.run(1, of_this_rank(packs_of_step(variant, 1)))
    with recorded_gathers(trainer) as events:
        trainer.run(2, of_this_rank(packs_of_step(variant, 2)))
    return bytes_of_weights(trainer), events


def created_groups(variant: str, folder: str, layout: str) -> list[Any]:
    """Return the groups that a process creates during a step.

    Without gloo groups and those that only members create: over NCCL all processes must create a group together, those
    outside the group included.
    """
    created = []
    true_new_group = dist.new_group

    def new_group(ranks: Sequence[int] | None = None, **options: Any) -> Any:
        if options.get("backend") != "gloo" and not options.get("use_local_synchronization"):
            created.append(ranks and list(ranks))
        return true_new_group(ranks, **options)

    with patch.object(dist, "new_group", new_group):
        train(variant, folder, layout, steps=[1])
    return created


def image_token_error(variant: str, folder: str, layout: str) -> str:
    """Return the error of a step on a pack in which the grids of the first two images are exchanged."""
    trainer = make_trainer(variant, folder, layout)
    batch = packs_of_step(variant, 1)[2]
    exchanged = replace(batch, grid_thw=batch.grid_thw[[1, 0, 2]])
    try:
        trainer.run(1, [exchanged])
    except ImageTokenError as error:
        return str(error)
    return "no error"


def losses_beside(variant: str, folder: str, layout: str, seed: int) -> dict[str, float]:
    """Return the loss of each domain on `packs_with_neighbour`."""
    trainer = make_trainer(variant, folder, layout)
    return trainer.run(1, of_this_rank(packs_with_neighbour(variant, seed))).domain_losses


def gradients(
    variant: str, folder: str, layout: str, expected: str, break_by: str = ""
) -> dict[str, tuple[float, float]]:
    """Compare the gradients of the first step with those in the file `expected`.

    Args:
        variant: Variant of the model.
        folder: Its weights.
        layout: Name of the layout.
        expected: The file.
        break_by: Name of the deliberately broken variant of the code to run.

    Returns:
        For every gradient the summed squares of its difference and of the expected gradient.
    """
    with broken(break_by) as break_model:
        trainer = make_trainer(variant, folder, layout, balance=False)
        break_model(trainer.model_chunks)
        # Give every rank whole gradients; the distributed optimizer would leave it a part of them.
        true_schedule = training.step.get_forward_backward_func
        training.step.get_forward_backward_func = lambda: partial(get_forward_backward_func(), force_all_reduce=True)
        try:
            trainer.measure(of_this_rank(packs_of_step(variant, 1)), lambda *_: None)
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
    """Return parameters and expert biases of this rank by their names in the whole model."""
    return dict(named for chunk in chunks for named in local_tensors(chunk))


def canonical_parameters(chunk: GlmvModel) -> dict[str, Any]:
    """Return the parameters of a chunk by their names in the whole model."""
    names = [name for name, _ in local_tensors(chunk) if not name.endswith("expert_bias")]
    return dict(zip(names, chunk.parameters(), strict=True))


def differences_of(
    held: dict[str, Tensor], config: GlmvConfig, reference: dict[str, Tensor]
) -> dict[str, tuple[float, float]]:
    """Return for every tensor of this rank the summed squares of its difference from `reference` and of the latter."""
    table = {weight.name: weight for weight in weights(config)}
    squares = {}
    for name, local in held.items():
        expected = this_ranks_part(table[name], tuple(local.shape)).of(reference[name]).double()
        squares[name] = ((local.double() - expected).square().sum().item(), expected.square().sum().item())
    return squares
