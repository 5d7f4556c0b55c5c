"""The engine inside the run's own processes: the trained model as transformers' module, on each data-parallel rank.

The first process of a data-parallel rank (its lead) holds the whole model a second time, beside its part of the one
that is trained. New weights are copied into it tensor by tensor. The leads share the requests; then all processes get
all rollouts. A rollout is a function of the weights, its prompt and its seed: what is drawn beside it, on which process
and after which, changes its probabilities by rounding alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
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
from training.step import TrainStep

ROWS = 256  # responses that are drawn together, at most
CACHE_BYTES = 2**32  # of their keys and values, at most; a single group may need more
TIMEOUT = timedelta(hours=12)  # in which the slowest lead has drawn its share


class EmbeddedEngine:
    """Draws rollouts in the processes of the run. Constructing it is collective.

    Args:
        config: The model.
        special: The tokens that end a response.
        dtype: Of the weights, as in the run.
        rows: Responses that are drawn together, at most.
        cache_bytes: Of their keys and values, at most.

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
    ) -> None:
        self.config, self.special, self.rows = config, special, rows
        self.version = 0
        self.quarantined: dict[str, str] = {}  # none: it answers every prompt
        decoder = config.decoder
        token_bytes = 2 * decoder.num_hidden_layers * decoder.num_key_value_heads * decoder.head_dim * dtype.itemsize
        self._cache_tokens = cache_bytes // token_bytes
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self.module: Any = None
        self._places: Mapping[str, Tensor] = {}
        if _is_lead():
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
        """Draw rollouts. Collective."""
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        drawn: dict[int, list[Rollout]] = {}
        if self.module is not None:
            decoding = Decoding(self.module, self.config.image_token_id, self.special, sampling)
            own = range(rank, len(requests), ranks)
            for numbers in self._batches(requests, own, sampling):
                groups = decoding.generate([requests[number] for number in numbers], self.version)
                drawn |= dict(zip(numbers, groups, strict=True))
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, drawn, group=self._group)
        all_drawn = {number: group for each in everyone for number, group in each.items()}
        return [rollout for number in range(len(requests)) for rollout in all_drawn[number]]

    def close(self) -> None:
        """Release the module."""
        self.module, self._places = None, {}

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


def _is_lead() -> bool:
    """Return whether this is the first process of its data-parallel rank."""
    ranks = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    return not any(ranks)
