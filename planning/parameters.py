"""Counts the parameters of all ranks together, each once, as a checkpoint of the run would hold them."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica

from model.glmv import build_model_chunks
from model.rank_sizes import BUFFERS
from planning.on_paper import DEVICE, on_paper
from planning.rank_trace import Traced
from training.dtypes import DTYPES


def distinct_parameters(traced: Traced, rank: int) -> int:
    """Build the model of a rank and count the parameters that it alone writes into a checkpoint.

    Over all ranks of a layout this is every parameter once, whatever the layout repeats.
    """
    with on_paper(traced.config.parallel, rank, traced.processes):
        with torch.device(DEVICE):
            chunks = build_model_chunks(
                traced.model,
                traced.config.parallel,
                pipeline_layout=traced.stages,
                dtype=DTYPES[traced.config.train.precision],
                backend=traced.backend,
            )
        return sum(
            prod(tensor.local_shape)
            for chunk in chunks
            for tensor in _sharded(chunk.sharded_state_dict())
            if is_main_replica(tensor.replica_id) and not tensor.key.endswith(BUFFERS)
        )


def _sharded(node: Any) -> Iterator[ShardedTensor]:
    """Yield the tensors of a state dict; those that a factory would make are parts of one tensor."""
    if isinstance(node, ShardedTensor):
        yield node
    elif hasattr(node, "build"):
        yield from _sharded(node.build())
    elif isinstance(node, dict):
        for value in node.values():
            yield from _sharded(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _sharded(value)
