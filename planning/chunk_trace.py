"""One pack through every model chunk of a rank, and from that the peak of a schedule with any number of packs.

What a pack keeps does not depend on the other packs. So each chunk computes one pack alone, and the order of the
schedule's forward and backward passes says how many packs each chunk keeps at the same time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import custom_backward, deallocate_output_tensor
from torch import Tensor

from data_pipeline.encoding.batch import Batch
from planning.memory import MemoryTrace
from planning.on_paper import DEVICE
from training.batch_broadcast import broadcast_patches
from training.step import TrainStep, forward_step

# At the first stage and at others: counted in whole schedules, without and with virtual stages.
IN_TRANSFER = {False: (0, 5), True: (2, 8)}


@dataclass(frozen=True)
class ChunkMemory:
    """What one pack adds to the live bytes in a model chunk."""

    kept: int  # by the forward pass, until the backward pass
    forward: int  # at most during the forward pass
    backward: int  # at most during the backward pass, with what was kept


@dataclass(frozen=True)
class Schedule:
    """The order in which a pipeline rank computes; megatron-core's 1F1B, interleaved where there are virtual stages."""

    stages: int
    rank: int
    chunks: int
    packs: int

    def passes(self) -> Iterator[tuple[bool, int]]:
        """Yield whether a pass is forward, and of which chunk."""
        total = self.packs * self.chunks
        ahead = self.stages - self.rank - 1
        if self.chunks > 1:
            ahead = 2 * ahead + (self.chunks - 1) * self.stages
        ahead = min(ahead, total)
        chunk_of = [number // self.stages % self.chunks for number in range(total)]
        yield from ((True, chunk) for chunk in chunk_of[:ahead])
        for forward, backward in zip_longest(chunk_of[ahead:], chunk_of):
            if forward is not None:
                yield True, forward
            yield False, self.chunks - 1 - backward

    @property
    def in_transfer(self) -> int:
        """Hidden states, at most, that are sent or received while others are computed; not those of packs in flight."""
        if self.stages == 1:
            return 0
        at_first, at_others = IN_TRANSFER[self.chunks > 1]
        return at_others if self.rank else at_first

    def peak(self, chunks: Sequence[ChunkMemory], patches: int) -> int:
        """Return the most bytes that live in a step, without those of `in_transfer`.

        Args:
            chunks: What one pack adds in each chunk.
            patches: Bytes of a pack's patches, of which the device holds the present pack's and the next one's.
        """
        live = peak = entered = 0
        for is_forward, number in self.passes():
            chunk = chunks[number]
            entered += is_forward and number == 0
            waiting = patches if entered < self.packs else 0
            if is_forward:
                peak = max(peak, live + waiting + chunk.forward)
                live += chunk.kept
            else:
                live -= chunk.kept
                peak = max(peak, live + waiting + patches + chunk.backward)
        return peak


def run_pack(trace: MemoryTrace, trainer: TrainStep, batch: Batch) -> list[ChunkMemory]:
    """Compute one pack in each chunk alone, forward and backward, and reduce the gradients.

    Args:
        trace: What follows the tensors; it is active.
        trainer: The rank's model and optimizer.
        batch: The pack.
    """
    memory = [_run_chunk(trace, trainer, ddp, batch) for ddp in trainer.ddp]
    trainer.config.finalize_model_grads_func(trainer.ddp, None)
    return memory


def _run_chunk(trace: MemoryTrace, trainer: TrainStep, ddp: Any, batch: Batch) -> ChunkMemory:
    chunk, before, pipeline = ddp.module, trace.live, parallel_state.get_pipeline_model_parallel_group()
    trace.reset_peak()
    received = None if chunk.pre_process else hidden_states(trainer).requires_grad_()
    chunk.set_input_tensor([received])
    batches = broadcast_patches([batch]) if chunk.pre_process else iter([batch])
    output, loss_of = forward_step(zip_longest(batches, [None]), ddp, loss_scale=1.0)
    if chunk.post_process:
        output, _ = loss_of(output)
    else:
        dist.send(output.detach(), parallel_state.get_pipeline_model_parallel_next_rank(), pipeline)
    del batches, loss_of  # they hold the patches, which no layer keeps
    deallocate_output_tensor(output, True)
    kept, forward = trace.live - before, trace.peak - before
    trace.reset_peak()
    custom_backward(output, None if chunk.post_process else hidden_states(trainer))
    if received is not None:
        assert received.grad is not None
        dist.send(received.grad, parallel_state.get_pipeline_model_parallel_prev_rank(), pipeline)
    return ChunkMemory(kept, forward, trace.peak - before)


def hidden_states(trainer: TrainStep) -> Tensor:
    """Return what one pipeline stage sends another for a pack: [tokens of this rank, 1, hidden size]."""
    config = trainer.config
    shared = config.context_parallel_size * (config.tensor_model_parallel_size if config.sequence_parallel else 1)
    return torch.empty(trainer.seq_length // shared, 1, config.hidden_size, dtype=config.pipeline_dtype, device=DEVICE)
