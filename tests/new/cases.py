"""What the processes of tests/new run with one version of megatron-core each: save a run, load it and save it again."""

from __future__ import annotations

from pathlib import Path

import megatron.core

from model.checkpoint import load_checkpoint, read_train_state, save_checkpoint
from tests.model import layout_cases
from tests.model.layout_cases import make_trainer

STEPS = (1, 2)


def version() -> str:
    return str(megatron.core.__version__).split("+")[0]


def train_and_save(variant: str, folder: str, layout: str, checkpoint: str, dtype: str = "float32") -> None:
    """Save a run after two steps, so that moments, expert biases and main weights are not trivial."""
    layout_cases.train(variant, folder, layout, steps=STEPS, dtype=dtype, checkpoint=checkpoint)


def load_and_save(
    variant: str, folder: str, layout: str, source: str, target: str, dtype: str = "float32", lr: float = 0.0
) -> list[tuple[int, float]]:
    """Load a checkpoint into a new run and save it again.

    Args:
        variant: Variant of the model.
        folder: Its first weights.
        layout: Name of the layout.
        source: The checkpoint.
        target: Where it is saved again.
        dtype: Of the parameters.
        lr: Learning rate of the new run; 0: as before.

    Returns:
        Step and learning rate of each group of the optimizer.
    """
    optimizer = layout_cases.OPTIMIZER
    if lr:
        layout_cases.OPTIMIZER = layout_cases.OptimizerConfig(lr=lr, min_lr=lr / 2, weight_decay=0.2)
    try:
        trainer = make_trainer(variant, folder, layout, STEPS[-1], dtype)
    finally:
        layout_cases.OPTIMIZER = optimizer
    load_checkpoint(Path(source), trainer.model_chunks, trainer.optimizer)
    save_checkpoint(
        Path(target),
        trainer.model_chunks,
        hf_files=lambda _: None,
        optimizer=trainer.optimizer,
        train_state=read_train_state(Path(source)),
    )
    return [(group["step"], group["max_lr"]) for group in trainer.optimizer.param_groups]
