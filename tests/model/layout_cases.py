"""What the processes of the layout tests do: train a few steps in a layout, and compare with a reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from data_pipeline.batch import Batch
from model.config import GlmvConfig
from model.glmv import build_model_chunks
from model.hf_weights import SafetensorsFolder, load_weights, local_tensors, this_ranks_slice
from model.parallel import ParallelConfig, initialize_model_parallel
from model.weight_table import weights
from pretrain.optimizer import OptimizerConfig
from pretrain.step import TrainStep
from tests.reference import Clip, Part, Picture, Words, make_sample, pack, small_config

SEQ_LENGTH = 192
OPTIMIZER = OptimizerConfig(lr=1e-3, min_lr=1e-3, decay_style="constant", weight_decay=0.1, clip_grad=1.0)

# Four packs a step. With two data-parallel ranks, the second has the packs without images.
PACKS: list[list[list[Part]]] = [
    [[Words(3), Picture(4, 6), Words(30)], [Words(25)], [Words(4), Clip(2, 4, 4), Words(9)]],
    [[Words(60)], [Words(17)]],
    [[Picture(8, 4), Words(20)], [Words(9), Picture(2, 2), Words(5), Picture(4, 4), Words(11)]],
    [[Words(100)], [Words(40)], [Words(5)]],
]


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


def packs_of_step(variant: str, step: int) -> list[Batch]:
    config = small_config(variant)
    batches = []
    for p, samples in enumerate(PACKS):
        made = [make_sample(config, parts, seed=1000 * step + 10 * p + s, domain="image_text" if s else "text")
                for s, parts in enumerate(samples)]  # fmt: skip
        batches.append(pack(made, SEQ_LENGTH))
    return batches


def train(
    variant: str,
    folder: str,
    layout: str,
    steps: int,
    dtype: str = "float32",
    balance: bool = True,
    save_to: str = "",
    compare_with: str = "",
) -> dict[str, Any]:
    """Train `steps` steps from the weights in `folder`. Returns losses, gradient norms and other figures of each step;
    with `compare_with`, also the summed squares of the difference of every tensor, and of the tensor."""
    parallel, stages = layout_of(layout)
    initialize_model_parallel(parallel, seed=1)
    coefficients: dict[str, Any] = {"balance_loss_coeff": 0.01, "expert_bias_update_rate": 1e-3} if balance else {}
    chunks = build_model_chunks(
        small_config(variant), parallel, pipeline_layout=stages, dtype=getattr(torch, dtype), **coefficients
    )
    load_weights(chunks, SafetensorsFolder(folder))
    trainer = TrainStep([chunk.train() for chunk in chunks], OPTIMIZER, steps, SEQ_LENGTH)
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    reports = [vars(trainer.run(step, packs_of_step(variant, step)[rank::ranks])) for step in range(1, steps + 1)]
    trainer.synchronize_weights()
    held = dict(named for chunk in chunks for named in local_tensors(chunk))
    if save_to:
        torch.save({name: tensor.clone() for name, tensor in held.items()}, save_to)
    differences = (
        differences_of(held, small_config(variant), torch.load(Path(compare_with), weights_only=True))
        if compare_with
        else {}
    )
    return {"reports": reports, "differences": differences, "rank": dist.get_rank()}


def differences_of(
    held: dict[str, Tensor], config: GlmvConfig, reference: dict[str, Tensor]
) -> dict[str, tuple[float, float]]:
    stacked = {weight.name: weight.transform.stacked for weight in weights(config)}
    squares = {}
    for name, local in held.items():
        expected = this_ranks_slice(reference[name], local, name, stacked[name]).double()
        squares[name] = ((local.double() - expected).square().sum().item(), expected.square().sum().item())
    return squares
