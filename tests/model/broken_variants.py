"""Deliberately broken variants of the model, wrong in ways that the loss hardly shows. Layout tests must catch them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from megatron.core import parallel_state
from torch import Tensor

import model.attention
import model.glmv
from model.context_slicing import context_tokens
from model.embedding_exchange import EmbeddingExchange
from model.glmv import GlmvModel
from model.parameter_marks import mark_parameters
from model.rope import DecoderRope

Break = Callable[[Sequence[GlmvModel]], None]


def leave_as_is(chunks: Sequence[GlmvModel]) -> None:
    pass


@contextmanager
def mask_one_segment_off() -> Iterator[Break]:
    """The first segment's mask reaches 8 tokens into the second."""
    true_pack = model.attention.packed_segments

    def shifted(cu_seqlens: Tensor, *args: Any) -> Any:
        boundaries = cu_seqlens.clone()
        boundaries[1] += 8
        return true_pack(boundaries, *args)

    with patch.object(model.glmv, "packed_segments", shifted):
        yield leave_as_is


@contextmanager
def positions_of_another_rank() -> Iterator[Break]:
    """Each context rank rotates its tokens by the positions of the other rank."""
    true_rope, true_pack = DecoderRope.forward, model.attention.packed_segments
    seen: dict[str, Tensor] = {}

    def remember(cu_seqlens: Tensor, *args: Any) -> Any:
        seen["boundaries"] = cu_seqlens
        return true_pack(cu_seqlens, *args)

    def swapped(self: DecoderRope, *args: Any, **kwargs: Any) -> Tensor:
        angles = true_rope(self, *args, **kwargs)
        mine, other = (context_tokens(seen["boundaries"], 2, rank) for rank in (0, 1))
        wrong = angles.clone()
        wrong[mine], wrong[other] = angles[other], angles[mine]
        return wrong

    with patch.object(model.glmv, "packed_segments", remember), patch.object(DecoderRope, "forward", swapped):
        yield leave_as_is


@contextmanager
def norm_gradient_not_reduced() -> Iterator[Break]:
    """Each tensor rank keeps one norm's gradient of its own tokens."""

    def unmark(chunks: Sequence[GlmvModel]) -> None:
        for chunk in chunks:
            chunk.language_model.decoder.layers[-1].pre_mlp_layernorm.weight.sequence_parallel = False

    yield unmark


@contextmanager
def tower_not_reduced() -> Iterator[Break]:
    """Each tensor rank keeps the gradient of its own images."""

    def unmark(chunks: Sequence[GlmvModel]) -> None:
        for parameter in chunks[0].vision_model.parameters():
            parameter.average_gradients_across_tp_domain = False

    yield unmark


@contextmanager
def embeddings_at_wrong_positions() -> Iterator[Break]:
    """Received embeddings are written one position too far."""
    true_table = EmbeddingExchange.table

    def shifted(self: EmbeddingExchange, *args: Any) -> Any:
        table = true_table(self, *args)
        table.received_positions.copy_(table.received_positions.roll(1))
        return table

    with patch.object(EmbeddingExchange, "table", shifted):
        yield leave_as_is


@contextmanager
def experts_reduced_over_wrong_ranks() -> Iterator[Break]:
    """An expert's gradient is reduced as if all ranks had that expert."""

    def without_experts(chunk: GlmvModel, vision_sharding: str) -> None:
        mark_parameters(chunk, vision_sharding)
        for name, parameter in chunk.named_parameters():
            if ".experts." in name:
                parameter.allreduce = True

    with patch.object(model.glmv, "mark_parameters", without_experts):
        yield leave_as_is


@contextmanager
def tokens_of_another_rank() -> Iterator[Break]:
    """The model works on the tokens whose losses the other context rank asks for."""

    def of_the_other(cu_seqlens: Tensor) -> Tensor:
        return context_tokens(cu_seqlens, 2, 1 - parallel_state.get_context_parallel_rank())

    with patch.object(model.glmv, "my_context_tokens", of_the_other):
        yield leave_as_is


VARIANTS: dict[str, Callable[[], Any]] = {
    "mask one segment off": mask_one_segment_off,
    "positions of another rank": positions_of_another_rank,
    "norm gradient not reduced": norm_gradient_not_reduced,
    "tower not reduced": tower_not_reduced,
    "embeddings at wrong positions": embeddings_at_wrong_positions,
    "experts reduced over wrong ranks": experts_reduced_over_wrong_ranks,
    "tokens of another rank": tokens_of_another_rank,
}


@contextmanager
def broken(variant: str) -> Iterator[Break]:
    """Break the code inside the context by a name in VARIANTS ("": not at all), and yield what breaks a built model."""
    if not variant:
        yield leave_as_is
        return
    with VARIANTS[variant]() as break_model:
        yield break_model
