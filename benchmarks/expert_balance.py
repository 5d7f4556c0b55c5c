"""How even the experts' load is through the three stages, with and without the update of the expert biases.

    make demo-data && python -m benchmarks.expert_balance

The tiny GLM-4.5V is pretrained, continued at four times the length and fine-tuned by configs/tiny/, twice: with the
published rate of the update (report, section 3.2) and without. The figure is the violation of balance, MaxVio
(Wang et al., arXiv 2408.15664): tokens of the busiest expert over those of an even share, less 1, from the tokens of
the last WINDOW steps, in the worst of the layers. Writes docs/images/expert_balance.png.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from sft.train import SftConfig
from training.config import RunConfig, load_config
from training.distributed import process_group
from training.guard import guarded
from training.loop import Run
from training.setup import prepare
from training.start_point import find_start_point
from training.step import TrainStep

STAGES = {"pretrain": (RunConfig, 400), "long_context": (RunConfig, 100), "sft": (SftConfig, 300)}  # schema, steps
RATES = {"bias update 1e-3": 1e-3, "no update": 0.0}
WINDOW = 50  # steps
FIGURE = Path("docs/images/expert_balance.png")


def main() -> None:
    """Train with each rate, print the violations at the end of the stages and draw their curves."""
    curves = {name: train_all_stages(rate) for name, rate in RATES.items()}
    table = Table("largest violation, last 50 steps", *STAGES)
    for name, violations in curves.items():
        ends = accumulate(steps for _, steps in STAGES.values())
        table.add_row(name, *(f"{violations[end - 1]:.2f}" for end in ends))
    Console().print(table)
    draw(curves)


def train_all_stages(rate: float) -> np.ndarray:
    """Return the violation at every step of the three stages, float64 [steps]."""
    tokens: list[np.ndarray] = []
    with tempfile.TemporaryDirectory() as folder:
        start = "model.preset=tiny_moe"
        for stage, (schema, steps) in STAGES.items():
            out = f"{folder}/{stage}"
            keys = [start, f"train.output_dir={out}", f"train.steps={steps}", f"moe.expert_bias_update_rate={rate}"]
            train(load_config(schema, Path(f"configs/tiny/{stage}.yaml"), keys), tokens)
            start = f"model.init_from={out}"
    totals = np.cumsum(np.stack(tokens), axis=0)  # [steps, layers, experts]
    totals[WINDOW:] -= totals[:-WINDOW].copy()
    return (totals.max(axis=2) / totals.mean(axis=2)).max(axis=1) - 1


def train(config: RunConfig, tokens: list[np.ndarray]) -> None:
    """Train a stage and append the tokens of its experts at every step, [layers, experts]."""
    prepared = prepare(config)
    with process_group(config.health.collective_timeout), guarded(config) as guard:
        run = Run(prepared, find_start_point(config), guard)
        record_tokens(run.trainer, tokens)
        run.train()


def record_tokens(trainer: TrainStep, tokens: list[np.ndarray]) -> None:
    """Read the routers' counts before megatron-core uses and clears them."""
    [model] = trainer.model_chunks
    finalize = model.config.finalize_model_grads_func

    def finalize_and_record(*args: Any, **kwargs: Any) -> None:
        tokens.append(torch.stack([router.local_tokens_per_expert for router in model.routers()]).cpu().numpy())
        finalize(*args, **kwargs)

    model.config.finalize_model_grads_func = finalize_and_record


def draw(curves: Mapping[str, np.ndarray]) -> None:
    """Draw the curves into FIGURE."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, violations in curves.items():
        axes.plot(range(1, len(violations) + 1), violations, label=name)
    axes.axhline(0.3, color="gray", linestyle=":", linewidth=1)
    begin = 0
    for stage, (_, steps) in STAGES.items():
        axes.axvline(begin, color="gray", linewidth=0.5)
        axes.text(begin + 5, axes.get_ylim()[1] * 0.93, stage, color="gray")
        begin += steps
    axes.set(xlabel="step", ylabel="busiest expert / even share - 1", xlim=(0, begin), ylim=(0, None))
    axes.set_title(f"Expert balance of the tiny GLM-4.5V, over the last {WINDOW} steps", loc="left", fontsize=10)
    axes.legend(frameon=False)
    figure.savefig(FIGURE, dpi=110)


if __name__ == "__main__":
    main()
