"""What the processes of the validation tests run: train a few steps, with or without validation in between."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.model.layout_cases import layout_of, tensors_of
from training.batch_broadcast import broadcast_batches
from training.config import RunConfig, load_config
from training.samples import answer
from training.setup import build_trainer, prepare
from training.start_point import find_start_point
from training.validation import held_out_loss


def run(config: str, overrides: Sequence[str], layout: str, steps: int, validate: bool) -> dict[str, Any]:
    """Train `steps` steps in a layout. With `validate`, compute losses and answers before the first and in between.

    Returns:
        What every step reports, a checksum of this rank's weights, expert biases and random state at the end, and the
        held-out losses and answers.
    """
    with as_torchrun():
        parallel = [f"parallel.{key}={value}" for key, value in vars(layout_of(layout)[0]).items()]
        settings = load_config(RunConfig, Path(config), [*overrides, *parallel])
        prepared = prepare(settings)
        trainer = build_trainer(prepared, find_start_point(settings))
    reports, losses, answers = [], [], []

    def look() -> None:
        assert prepared.validation.loader is not None
        if validate:
            assert held_out_loss(trainer, prepared.validation.loader, may_continue=lambda: False) is None
            loss = held_out_loss(trainer, prepared.validation.loader, settings.validation.steps)
            losses.append(vars(loss))
            answers.append(
                answer(
                    trainer,
                    prepared.validation.prompts,
                    prepared.loader.tokenizer,
                    max_tokens=settings.validation.samples_max_tokens,
                    segment_multiple=settings.data.segment_multiple,
                )
            )

    look()
    for step in range(1, steps + 1):
        reports.append(vars(trainer.run(step, broadcast_batches(prepared.loader.next_step))))
        if step < steps:
            look()
    trainer.synchronize_weights()
    digest = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
    for tensor in tensors_of(trainer.model_chunks).values():
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    training = all(module.training for chunk in trainer.ddp for module in chunk.modules())
    return {
        "reports": reports,
        "digest": digest.hexdigest(),
        "losses": losses,
        "answers": answers,
        "is training": training,
    }


@contextmanager
def as_torchrun() -> Iterator[None]:
    """Set the variables of torchrun, which say how many processes there are."""
    names = {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    os.environ.update(names)
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]
