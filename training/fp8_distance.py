"""How far FP8 is from no FP8: two trainings from the same weights on the same packs, compared.

Gradients are those of the first step, before any update, so that their distance is the rounding's alone. The losses are
those of all steps: each training follows its own weights. Recipe `delayed` gets its first scales from the packs of the
first step, because scales of 1, with which it begins, say nothing about later steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.canonical_names import canonical_name
from model.config import ConfigError
from model.fp8 import Fp8Config
from training.batch_broadcast import broadcast_batches
from training.config import RunConfig
from training.fp8_checks import describe_fp8
from training.setup import Prepared, build_trainer, prepare
from training.start_point import find_start_point
from training.step import TrainStep


@dataclass(frozen=True)
class ModuleDistance:
    """The gradient of a module in FP8, against that without; experts of a layer together."""

    module: str
    relative: float  # norm of the difference over the norm without FP8
    cosine: float


@dataclass(frozen=True)
class Fp8Distance:
    """What the two trainings gave."""

    recipe: str
    description: str  # what is in FP8, and by what it is computed
    losses: list[float]  # without FP8, of each step
    fp8_losses: list[float]
    gradient: ModuleDistance  # of the whole model
    modules: list[ModuleDistance]

    @property
    def loss_distances(self) -> list[float]:
        """The relative difference of the losses of each step."""
        return [fp8 / base - 1 for base, fp8 in zip(self.losses, self.fp8_losses, strict=True)]


@dataclass(frozen=True)
class _Training:
    losses: list[float]
    gradients: list[Tensor]  # this rank's shards, float32 in main memory
    names: list[str]


def prepare_pair(config: RunConfig, nowhere: Path) -> tuple[Prepared, Prepared]:
    """Check the configuration without FP8 and with it, and open the data of both. Writes nothing.

    Args:
        config: the run, with a recipe.
        nowhere: a folder that does not exist: the run's own folder is not looked at.

    Raises:
        ConfigError, DataError, CheckpointError, WeightsError: the configuration cannot work.
    """
    if not config.fp8.enabled:
        raise ConfigError("fp8.recipe=none leaves nothing to compare: add fp8.recipe=blockwise, or another recipe")
    config = replace(
        config,
        train=replace(config.train, output_dir=str(nowhere), check_determinism=0),
        data=replace(config.data, num_workers=0),
        validation=replace(config.validation, interval=0, samples_interval=0),
    )
    return prepare(replace(config, fp8=Fp8Config())), prepare(config)


def compare(without: Prepared, with_fp8: Prepared, steps: int, advance: Callable[[], None]) -> Fp8Distance:
    """Train twice and compare. Collective; processes must have joined.

    Args:
        without: the run without FP8.
        with_fp8: the same run with it.
        steps: of each training.
        advance: called after every step of either.

    Raises:
        StepError: a step cannot be computed.
    """
    base = _train(without, steps, advance)
    fp8 = _train(with_fp8, steps, advance)
    sums: dict[str, Tensor] = {}
    for name, ours, theirs in zip(base.names, base.gradients, fp8.gradients, strict=True):
        products = ((theirs - ours).square().sum(), ours.square().sum(), theirs.square().sum(), (ours * theirs).sum())
        sums[name] = sums.get(name, 0) + torch.stack(products).double()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {name: values.tolist() for name, values in sums.items()})
    totals: dict[str, Tensor] = {}
    for part in everyone:
        for name, values in part.items():
            totals[name] = totals.get(name, 0) + torch.tensor(values, dtype=torch.float64)
    modules = [_distance(name, values) for name, values in sorted(totals.items())]
    whole = _distance("", sum(totals.values(), torch.zeros(4, dtype=torch.float64)))
    description = " ".join(describe_fp8(with_fp8.config, with_fp8.model))
    return Fp8Distance(with_fp8.config.fp8.recipe, description, base.losses, fp8.losses, whole, modules)


def _distance(module: str, sums: Tensor) -> ModuleDistance:
    difference, base, fp8, product = sums.tolist()
    if not base:
        return ModuleDistance(module, 0.0 if not fp8 else math.inf, 1.0 if not fp8 else 0.0)
    return ModuleDistance(module, (difference / base) ** 0.5, product / (base * fp8) ** 0.5 if fp8 else 0.0)


def _train(prepared: Prepared, steps: int, advance: Callable[[], None]) -> _Training:
    """Compute the gradients of the first step, then take `steps` steps."""
    trainer = build_trainer(prepared, find_start_point(prepared.config))
    losses: list[float] = []
    gradients: list[Tensor] = []
    for step in range(1, steps + 1):
        batches = broadcast_batches(prepared.loader.next_step)
        if not batches:
            raise ConfigError(f"the data ends before step {step}: lower --steps, or give more data")
        if step == 1:
            if prepared.config.fp8.recipe == "delayed":
                trainer.measure(batches, moves_scales=True)
            trainer.measure(batches)
            shards = [shard for _, shard in trainer.part_norms.shards()]
            gradients = [shard.detach().float().cpu().clone() for shard in shards]
        losses.append(trainer.run(step, batches).loss)
        advance()
    prepared.loader.close()
    return _Training(losses, gradients, _module_names(trainer))


def _module_names(trainer: TrainStep) -> list[str]:
    """Return the module of each shard, by its name in the whole model; `experts` for all of a layer."""
    names = {
        parameter: canonical_name(chunk, name)
        for chunk in trainer.model_chunks
        for name, parameter in chunk.named_parameters()
    }
    return [module_of(names[parameter]) for parameter, _ in trainer.part_norms.shards()]


def module_of(parameter: str) -> str:
    """Return the module that a parameter counts for.

    >>> module_of("language_model.decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight")
    'language_model.decoder.layers.1.mlp.experts.linear_fc1'
    """
    words = parameter.split(".")[:-1]
    if "local_experts" in words:
        place = words.index("local_experts")
        del words[place : place + 2]
    return ".".join(words)
