"""The cases that the processes of the tests of switches run."""

from __future__ import annotations

from typing import Any

from tests.model.deep_ep import deep_ep_over_gloo
from tests.model.gathers import bytes_of_weights, recorded_gathers
from tests.training import step_cases
from tests.training.step_cases import make_trainer, take_steps


def train_with_deep_ep(**arguments: Any) -> dict[str, Any]:
    """Train with megatron-core's dispatcher for DeepEP."""
    with deep_ep_over_gloo():
        return step_cases.train(dispatch={"dispatcher": "flex"}, **arguments)


def gathered_by_an_update(variant: str, folder: str, layout: str) -> tuple[int, int]:
    """Take a step without overlap, and return the bytes that it gathers, and those of this rank's weights."""
    apart = {"overlap_grad_reduce": False, "overlap_param_gather": False}
    trainer = make_trainer(variant, folder, layout, optimizer=apart)
    with recorded_gathers(trainer) as events:
        take_steps(trainer, variant, [1])
    return sum(event for event in events if isinstance(event, int)), bytes_of_weights(trainer)
