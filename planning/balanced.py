"""Routing without values: every expert gets equally many tokens, or a rank more than its share.

Which experts a token goes to depends on values, and on paper there are none. The dispatcher learns the numbers of
tokens from a real routing map that is balanced. A rank with busy experts receives more: `imbalance` times its share.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import megatron.core.transformer.moe.token_dispatcher as dispatchers
import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor


@contextmanager
def balanced_routing(imbalance: float = 1.0) -> Iterator[None]:
    """Let the all-to-all dispatcher work on routing maps without values.

    Args:
        imbalance: Tokens that this rank receives for its experts, over an even share.
    """
    true_preprocess = MoEAlltoAllTokenDispatcher.preprocess

    def preprocess(self: Any, routing_map: Tensor) -> Tensor:
        tokens, experts = routing_map.shape
        balanced = balanced_map(tokens, experts, self.config.moe_router_topk)
        with mock.patch.object(dispatchers, "gather_from_sequence_parallel_region", _the_same_from_all):
            tokens_per_expert = true_preprocess(self, balanced)
        return _overload(self, tokens_per_expert, imbalance) if imbalance != 1 else tokens_per_expert

    with mock.patch.object(MoEAlltoAllTokenDispatcher, "preprocess", preprocess):
        yield


def balanced_map(tokens: int, experts: int, chosen: int) -> Tensor:
    """Return a routing map, bool [tokens, experts], in which each token goes to `chosen` experts.

    >>> balanced_map(3, 4, 2).int().tolist()
    [[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0]]
    """
    experts_of = (torch.arange(tokens)[:, None] * chosen + torch.arange(chosen)) % experts
    return torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, experts_of, True)


def _the_same_from_all(counts: Tensor, group: Any) -> Tensor:
    return torch.cat([counts] * group.size())


def _overload(dispatcher: Any, tokens_per_expert: Tensor, imbalance: float) -> Tensor:
    """Multiply what a rank receives from every rank for each of its experts."""
    if dispatcher.ep_size == 1:
        return tokens_per_expert
    received = getattr(dispatcher, "num_global_tokens_per_local_expert", None)
    if received is None:
        received = tokens_per_expert.expand(dispatcher.ep_size, 1) // dispatcher.ep_size
    received = (received * imbalance).round().long()
    by_rank = received.view(-1, dispatcher.ep_size, dispatcher.num_local_experts).sum(2)  # [tensor ranks, ranks]
    dispatcher.num_global_tokens_per_local_expert = received
    dispatcher.output_splits = by_rank[dispatcher.tp_rank]
    dispatcher.output_splits_tp = by_rank.sum(1)
    return received.sum(0)
