"""Ways in which a layout can be wrong that a look at the loss does not show. The layout tests must catch each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from megatron.core import parallel_state
from torch import Tensor

import model.attention
import model.glmv
from model.glmv import GlmvModel
from model.image_exchange import ImageSharing
from model.parallel import context_tokens
from model.rope import DecoderRope

Break = Callable[[Sequence[GlmvModel]], None]


def nothing(chunks: Sequence[GlmvModel]) -> None:
    pass


@contextmanager
def mask_one_segment_off() -> Iterator[Break]:
    """The first segment's mask reaches 8 tokens into the second."""
    true_pack = model.attention.packed_segments

    def off(cu_seqlens: Tensor, *args: Any) -> Any:
        bounds = cu_seqlens.clone()
        bounds[1] += 8
        return true_pack(bounds, *args)

    with patch.object(model.glmv, "packed_segments", off):
        yield nothing


@contextmanager
def positions_of_another_rank() -> Iterator[Break]:
    """Each context rank rotates its tokens by the positions of the other's."""
    true_rope, true_pack = DecoderRope.forward, model.attention.packed_segments
    seen: dict[str, Tensor] = {}

    def remember(cu_seqlens: Tensor, *args: Any) -> Any:
        seen["bounds"] = cu_seqlens
        return true_pack(cu_seqlens, *args)

    def swapped(self: DecoderRope, *args: Any, **kwargs: Any) -> Tensor:
        angles = true_rope(self, *args, **kwargs)
        mine, other = (context_tokens(seen["bounds"], 2, rank) for rank in (0, 1))
        wrong = angles.clone()
        wrong[mine], wrong[other] = angles[other], angles[mine]
        return wrong

    with patch.object(model.glmv, "packed_segments", remember), patch.object(DecoderRope, "forward", swapped):
        yield nothing


@contextmanager
def one_gradient_not_reduced() -> Iterator[Break]:
    """One norm's gradient is left as each tensor rank's own tokens make it."""

    def forget(chunks: Sequence[GlmvModel]) -> None:
        for chunk in chunks:
            chunk.language_model.decoder.layers[-1].pre_mlp_layernorm.weight.sequence_parallel = False

    yield forget


@contextmanager
def tower_not_reduced() -> Iterator[Break]:
    """Each tensor rank keeps the gradient of its own images."""

    def forget(chunks: Sequence[GlmvModel]) -> None:
        for parameter in chunks[0].vision_model.parameters():
            parameter.average_gradients_across_tp_domain = False

    yield forget


@contextmanager
def images_in_the_wrong_places() -> Iterator[Break]:
    """Rows arrive where the next ones belong."""
    true_plan = ImageSharing.plan

    def shifted(self: ImageSharing, *args: Any) -> Any:
        plan = true_plan(self, *args)
        plan.places.copy_(plan.places.roll(1))
        return plan

    with patch.object(ImageSharing, "plan", shifted):
        yield nothing


@contextmanager
def experts_reduced_over_the_wrong_ranks() -> Iterator[Break]:
    """An expert's gradient is treated as that of a weight which all ranks have."""
    true_mark = GlmvModel._mark_parameters

    def without_experts(self: GlmvModel) -> None:
        true_mark(self)
        for name, parameter in self.named_parameters():
            if ".experts." in name:
                parameter.allreduce = True

    with patch.object(GlmvModel, "_mark_parameters", without_experts):
        yield nothing


@contextmanager
def tokens_of_another_rank() -> Iterator[Break]:
    """The model works on the tokens whose losses the other context rank asks for."""

    def of_the_other(cu_seqlens: Tensor) -> Tensor:
        return context_tokens(cu_seqlens, 2, 1 - parallel_state.get_context_parallel_rank())

    with patch.object(model.glmv, "my_context_tokens", of_the_other):
        yield nothing


TWINS: dict[str, Callable[[], Any]] = {
    "mask one segment off": mask_one_segment_off,
    "positions of another rank": positions_of_another_rank,
    "one gradient not reduced": one_gradient_not_reduced,
    "tower not reduced": tower_not_reduced,
    "images in the wrong places": images_in_the_wrong_places,
    "experts reduced over the wrong ranks": experts_reduced_over_the_wrong_ranks,
    "tokens of another rank": tokens_of_another_rank,
}


@contextmanager
def broken(twin: str) -> Iterator[Break]:
    """Break the code in the way of this name while the context lasts; what it yields breaks a model. "": nothing."""
    if not twin:
        yield nothing
        return
    with TWINS[twin]() as break_model:
        yield break_model
