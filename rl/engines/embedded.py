"""The engine inside the run's own processes: the trained model as transformers' module, on each data-parallel rank.

The first process of a data-parallel rank (its lead) holds the whole model a second time, beside its part of the one
that is trained. New weights are copied into it tensor by tensor. The leads share the requests; then all processes get
all rollouts. A rollout is a function of the weights, its prompt and its seed: what is drawn beside it, on which process
and after which, changes its probabilities by rounding alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from model.config import GlmvConfig
from model.weights.stream import stream_tensors
from rl.engines.decoding import Decoding
from rl.engines.forcing import ResponseTokens
from rl.engines.policy_module import build_module, places
from rl.rollouts import Request, Rollout, Sampling
from rl.waiting import patient_group, work_together
from training.batch_broadcast import is_lead
from training.step import TrainStep

ROWS = 256  # responses that are drawn together, at most
CACHE_BYTES = 2**32  # of their keys and values, at most; a single group may need more


def token_bytes(config: GlmvConfig, dtype: torch.dtype) -> int:
    """Return the bytes of the keys and values of one token."""
    decoder = config.decoder
    return 2 * decoder.num_hidden_layers * decoder.num_key_value_heads * decoder.head_dim * dtype.itemsize


class EmbeddedEngine:
    """Draws rollouts in the processes of the run. Constructing it is collective.

    Args:
        config: The model.
        special: The tokens that end a response.
        dtype: Of the weights, as in the run.
        rows: Responses that are drawn together, at most.
        cache_bytes: Of their keys and values, at most.
        on_wait: Called after each token that is drawn, and again and again while other leads draw. Where it raises
            Interrupted, the rollouts are given up.

    Attributes:
        module: transformers' model on a lead, None elsewhere.
        version: Of the weights published last.
    """

    def __init__(
        self,
        config: GlmvConfig,
        special: ResponseTokens,
        dtype: torch.dtype,
        *,
        rows: int = ROWS,
        cache_bytes: int = CACHE_BYTES,
        on_wait: Callable[[], None] = lambda: None,
    ) -> None:
        self.config, self.special, self.rows, self.on_wait = config, special, rows, on_wait
        self.version = 0
        self.quarantined: dict[str, str] = {}  # none: it answers every prompt
        self._cache_tokens = cache_bytes // token_bytes(config, dtype)
        self._group = patient_group()
        leads: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(leads, is_lead(), group=self._group)
        self._leads = [rank for rank, is_one in enumerate(leads) if is_one]
        self.module: Any = None
        self._places: Mapping[str, Tensor] = {}
        if is_lead():
            self.module = build_module(config, dtype, torch.cuda.current_device())
            self._places = places(self.module, config)

    def publish(self, trainer: TrainStep, version: int) -> None:
        """Copy the trainer's weights, adapters merged. Collective."""
        trainer.synchronize_weights()
        for name, tensor in stream_tensors(trainer.model_chunks, to_all=True):
            if self._places:
                self._places[name].copy_(tensor)
        self.version = version

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        """Draw rollouts. Collective.

        Raises:
            Interrupted: `on_wait` raised it on a process that was still drawing. Raised on all processes.
        """
        drawn = work_together(self._group, lambda: self._draw_share(requests, sampling), self.on_wait)
        all_drawn: dict[int, list[Rollout]] = {}
        for lead in self._leads:  # one by one: gathering at once takes the largest share for each process
            share: list[Any] = [drawn]
            dist.broadcast_object_list(share, src=lead, group=self._group)
            all_drawn |= share[0]
        return [rollout for number in range(len(requests)) for rollout in all_drawn[number]]

    def close(self) -> None:
        """Release the module."""
        self.module, self._places = None, {}

    def _draw_share(self, requests: Sequence[Request], sampling: Sampling) -> dict[int, list[Rollout]]:
        """Return the rollouts of this lead's share of the requests, by number; of another process, nothing."""
        drawn: dict[int, list[Rollout]] = {}
        if self.module is None:
            return drawn
        decoding = Decoding(self.module, self.config.image_token_id, self.special, sampling, self.on_wait)
        own = range(
            parallel_state.get_data_parallel_rank(), len(requests), parallel_state.get_data_parallel_world_size()
        )
        for numbers in self._batches(requests, own, sampling):
            batch = [replace(requests[number], prompt=requests[number].prompt.decoded()) for number in numbers]
            groups = decoding.generate(batch, self.version)
            drawn |= dict(zip(numbers, groups, strict=True))
        return drawn

    def _batches(self, requests: Sequence[Request], own: Sequence[int], sampling: Sampling) -> Iterator[list[int]]:
        """Divide requests into those that are drawn together, of similar length."""
        longest = sampling.max_thinking_tokens + len(self.special.forced) + sampling.max_answer_tokens
        batch: list[int] = []
        rows = tokens = 0
        for number in sorted(own, key=lambda number: len(requests[number].prompt.sample)):
            copies = len(requests[number].seeds)
            more = len(requests[number].prompt.sample) + copies * longest
            if batch and (rows + copies > self.rows or tokens + more > self._cache_tokens):
                yield batch
                batch, rows, tokens = [], 0, 0
            batch.append(number)
            rows, tokens = rows + copies, tokens + more
        if batch:
            yield batch
