"""What the processes of the tests of parts do: train some steps with parts frozen or scaled, save, load, go on."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from model.checkpoint import TrainState, load_checkpoint, save_checkpoint
from model.glmv import GlmvModel
from model.hf_weights import SafetensorsFolder, load_weights, local_tensors
from model.parallel import ParallelConfig, initialize_model_parallel
from model.parts import MODULES, freeze
from model.recompute import RecomputeConfig
from pretrain.optimizer import LrScale, build_optimizer, build_scheduler, set_step
from pretrain.step import TrainStep
from tests.model.layout_cases import OPTIMIZER, SEQ_LENGTH, differences_of, packs_of_step
from tests.reference import small_config


def train(
    variant: str,
    folder: str,
    layout: dict[str, Any],
    *,
    steps: Sequence[int] = (1, 2, 3),
    frozen: Sequence[str] = (),
    lr_scale: dict[str, float] | None = None,
    recompute: str = "none",
    load_from: str = "",
    save_to: str = "",
    keep_in: str = "",
    compare_with: str = "",
) -> dict[str, Any]:
    """Train the steps from the weights in `folder`, or from the checkpoint `load_from`.

    Returns the steps' reports, which frozen tensors moved and which others did not, how many parameters each group of
    this rank has, and, with the file `compare_with` that another call has kept in `keep_in`, the differences from it.
    """
    parallel = ParallelConfig(**layout)
    initialize_model_parallel(parallel, seed=1)
    is_trained = "decoder" not in frozen
    model = GlmvModel(
        small_config(variant),
        parallel,
        balance_loss_coeff=0.01 * is_trained,
        expert_bias_update_rate=1e-3 * is_trained,
        recompute=RecomputeConfig(decoder=recompute, vision=recompute),
    )
    load_weights([model.train()], SafetensorsFolder(folder))
    freeze(model, frozen)
    scaled = replace(OPTIMIZER, lr_scale=LrScale(**(lr_scale or {})))
    trainer = TrainStep([model], scaled, max(steps), SEQ_LENGTH)
    if load_from:
        load_checkpoint(Path(load_from), model, trainer.optimizer)
    before = {name: tensor.clone() for name, tensor in local_tensors(model)}

    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    reports = [vars(trainer.run(step, packs_of_step(variant, step)[rank::ranks])) for step in steps]

    after = dict(local_tensors(model))
    same = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    of_frozen = {name for name in before if name.startswith(tuple(f"{MODULES[part]}." for part in frozen))}
    if keep_in:
        torch.save(after, keep_in)
    if save_to:
        progress = TrainState(step=max(steps))
        save_checkpoint(
            Path(save_to), model, companions=lambda _: None, optimizer=trainer.optimizer, train_state=progress
        )
    return {
        "reports": reports,
        "frozen but moved": of_frozen - same,
        "trained but still": same - of_frozen,
        "groups": [len(group["params"]) for group in trainer.optimizer.param_groups],
        "differences": differences_of(model, torch.load(compare_with, weights_only=True)) if compare_with else {},
        "rank": dist.get_rank(),
    }


def update_a_stage_each(
    variant: str, folder: str, *, steps: Sequence[int], load_from: str = "", save_to: str = ""
) -> dict[str, Any]:
    """The optimizer alone, on gradients made up from a tensor's name, where no rank has parameters of every group: of
    two pipeline stages the first holds the tower and the adapter, the second the decoder. One process holds all.

    Returns the gradient norms, the tensors of this rank, and its groups without their parameters.
    """
    initialize_model_parallel(ParallelConfig(), seed=1)
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=dist.get_world_size())
    model = GlmvModel(small_config(variant), ParallelConfig())
    load_weights([model], SafetensorsFolder(folder))
    if dist.get_world_size() == 2:
        for module in ["language_model"] if dist.get_rank() == 0 else ["vision_model", "adapter"]:
            delattr(model, module)
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    ddp = DistributedDataParallel(model.config, settings, model)
    scaled = replace(OPTIMIZER, lr_scale=LrScale(vision=0.1, router=2.0))
    optimizer = build_optimizer(scaled, [ddp], torch.float32)
    scheduler = build_scheduler(scaled, optimizer, 10)
    if load_from:
        load_checkpoint(Path(load_from), model, optimizer)
    norms = []
    for step in steps:
        set_step(scheduler, step)
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {step}".encode()))
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
        norms.append(float(optimizer.step()[1]))
    if save_to:
        progress = TrainState(step=max(steps))
        save_checkpoint(Path(save_to), model, companions=lambda _: None, optimizer=optimizer, train_state=progress)
    return {
        "norms": norms,
        "tensors": {name: parameter.detach().clone() for name, parameter in model.named_parameters()},
        "groups": [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups],
        "sizes": [len(group["params"]) for group in optimizer.param_groups],
    }
