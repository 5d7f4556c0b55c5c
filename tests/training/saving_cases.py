"""The cases that the processes of the tests of saving run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from model.checkpoint import TrainState, save_checkpoint, write_checkpoint
from model.checkpoint_state import StateCopy
from tests.training.step_cases import make_trainer, take_steps


def save_copies(variant: str, folder: str, layout: str, frozen: Sequence[str], out: str) -> None:
    """After two steps save the state and a copy of it, which is written after a third step; then the third likewise."""
    trainer = make_trainer(variant, folder, layout, frozen=frozen)
    group, state_copy = dist.new_group(backend="gloo"), StateCopy()
    take_steps(trainer, variant, [1, 2])
    for step in (2, 3):
        common = {"hf_files": lambda _: None, "train_state": TrainState(step=step)}
        save_checkpoint(Path(out) / f"state_{step}", trainer.model_chunks, optimizer=trainer.optimizer, **common)
        copied = state_copy.take(trainer.model_chunks, trainer.optimizer)
        take_steps(trainer, variant, [3])
        write_checkpoint(Path(out) / f"copy_{step}", copied, group=group, **common)
