"""The cases that the processes of the tests of saving run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from common import storage
from common.storage import StorageError
from model.checkpoint import TrainState, save_checkpoint, write_checkpoint
from model.checkpoint_manifest import check_manifest
from model.checkpoint_state import StateCopy
from model.errors import CheckpointError
from tests.training.step_cases import make_trainer, take_steps


def verify(folder: str) -> str:
    """Compare a checkpoint's files with its manifest, and return the error."""
    storage.DELAYS = (0.1,)
    try:
        check_manifest(Path(folder))
    except (CheckpointError, StorageError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def save_copies(variant: str, folder: str, layout: str, frozen: Sequence[str], out: str) -> None:
    """After two steps save the state and a copy of it, which is written after a third step; then the third likewise."""
    trainer = make_trainer(variant, folder, layout, frozen=frozen)
    group, state_copy = dist.new_group(backend="gloo"), StateCopy()
    take_steps(trainer, variant, [1, 2])
    for step in (2, 3):
        at_once, copied, state = Path(out) / f"state_{step}", Path(out) / f"copy_{step}", TrainState(step=step)
        chunks, optimizer = trainer.model_chunks, trainer.optimizer
        save_checkpoint(at_once, chunks, hf_files=lambda _: None, optimizer=optimizer, train_state=state)
        of_this_moment = state_copy.take(chunks, optimizer)
        take_steps(trainer, variant, [3])
        write_checkpoint(copied, of_this_moment, hf_files=lambda _: None, train_state=state, group=group)
