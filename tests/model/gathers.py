"""Record what DDP gathers, and when."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from megatron.core.distributed import param_and_grad_buffer
from torch import Tensor

from training.step import TrainStep


def bytes_of_weights(trainer: TrainStep) -> int:
    """Return the bytes of the buffers that hold this rank's weights."""
    buffers = [buffer for ddp in trainer.ddp for buffer in ddp.buffers + ddp.expert_parallel_buffers]
    return sum(buffer.param_data.nbytes for buffer in buffers)


@contextmanager
def recorded_gathers(trainer: TrainStep) -> Iterator[list[int | str]]:
    """Yield a list that gets the bytes of each gathered buffer, and each virtual stage whose forward pass begins."""
    events: list[int | str] = []
    true_gather: Callable[..., Any] = param_and_grad_buffer.dist_all_gather_func

    def gather(output: Tensor, *args: Any, **options: Any) -> Any:
        events.append(output.nbytes)
        return true_gather(output, *args, **options)

    def stage_begins(number: int, *_: Any) -> None:
        events.append(f"stage {number}")

    hooks = [
        chunk.register_forward_pre_hook(lambda *_, number=number: stage_begins(number))
        for number, chunk in enumerate(trainer.model_chunks)
    ]
    with patch.object(param_and_grad_buffer, "dist_all_gather_func", gather):
        yield events
    for hook in hooks:
        hook.remove()
