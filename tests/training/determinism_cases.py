"""What the processes of the determinism tests do: steps computed once and twice, and one that differs."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.model.layout_cases import canonical_parameters, of_this_rank, packs_of_step
from tests.training.step_cases import copies, make_trainer, take_steps
from training.run_errors import NonDeterministicStep


def once_and_twice(variant: str, folder: str, layout: str) -> dict[str, Any]:
    """Train three steps without and with the check; return their reports and the tensors that differ afterwards."""
    reports, held = [], []
    for check in (0, 1):
        trainer = make_trainer(variant, folder, layout, check_determinism=check)
        reports.append(take_steps(trainer, variant, (1, 2, 3)))
        held.append(copies(trainer))
    once, twice = held
    return {"reports": reports, "differ": [name for name in once if not torch.equal(once[name], twice[name])]}


def noisy_the_second_time(variant: str, folder: str, layout: str, name: str) -> str:
    """Return the error of a step in which the last rank's gradient `name` differs the second time."""
    trainer = make_trainer(variant, folder, layout, check_determinism=1)
    calls, packs = 0, len(of_this_rank(packs_of_step(variant, 1)))

    def disturb(gradient: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > packs:
            here[name].main_grad.mul_(1.001)  # where the gradient is added to DDP's buffer before this is called
            return gradient * 1.001
        return gradient

    here: dict[str, Any] = {key: p for chunk in trainer.model_chunks for key, p in canonical_parameters(chunk).items()}
    if dist.get_rank() == dist.get_world_size() - 1:
        here[name].register_hook(disturb)
    try:
        take_steps(trainer, variant, [1])
    except NonDeterministicStep as error:
        return str(error)
    return "no error"
