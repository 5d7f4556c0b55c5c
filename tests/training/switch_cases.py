"""The cases that the processes of the tests of switches run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.distributed import param_and_grad_buffer
from torch import Tensor

from tests.model.deep_ep import deep_ep_over_gloo
from tests.model.layout_cases import of_this_rank, packs_of_step
from tests.training import step_cases
from tests.training.step_cases import make_trainer


def train_with_deep_ep(**arguments: Any) -> dict[str, Any]:
    """Train with megatron-core's dispatcher for DeepEP."""
    with deep_ep_over_gloo():
        return step_cases.train(dispatch={"dispatcher": "flex"}, **arguments)


def gathers_of_a_step(variant: str, folder: str, layout: str, optimizer: dict[str, Any]) -> dict[str, Any]:
    """Take two steps, and return what the second one gathers, with the update of the first.

    Returns:
        The bytes of this rank's weights, and in order: the bytes of each gathered buffer, and the number of each
        virtual stage whose forward pass begins.
    """
    trainer = make_trainer(variant, folder, layout, optimizer=optimizer)
    events: list[Any] = []
    true_gather: Callable[..., Any] = param_and_grad_buffer.dist_all_gather_func

    def gather(output: Tensor, *args: Any, **options: Any) -> Any:
        events.append(output.nbytes)
        return true_gather(output, *args, **options)

    for number, chunk in enumerate(trainer.model_chunks):
        chunk.register_forward_pre_hook(lambda *_, number=number: events.append(f"stage {number}"))
    packs = [of_this_rank(packs_of_step(variant, step)) for step in (1, 2)]
    with patch.object(param_and_grad_buffer, "dist_all_gather_func", gather):
        trainer.run(1, packs[0])
        if optimizer["overlap_param_gather"]:
            events.clear()
            trainer.run(2, packs[1])
    buffers = {
        id(buffer): buffer.param_data.nbytes
        for ddp in trainer.ddp
        for buffer in ddp.buffers + ddp.expert_parallel_buffers
    }
    torch.distributed.barrier()
    return {"weights": sum(buffers.values()), "events": events}
