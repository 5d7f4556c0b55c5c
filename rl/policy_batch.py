"""`PolicyBatch`: a pack of rollouts, a `Batch` whose labels also say what the policy loss needs to know of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from data_pipeline.encoding.batch import Batch, EncodedSample, collate
from data_pipeline.encoding.rope_positions import rope_positions
from model.routed_experts import NOT_ROUTED
from rl.rollouts import Rollout, RoutedExperts


@dataclass(kw_only=True)
class PolicyBatch(Batch):
    """One pack of rollouts. The four tensors lie on the labels, as loss_mask does; they are 0 where it is 0."""

    weights: torch.Tensor  # float32 [tokens]: 1 / drawn tokens of the rollout, so that each rollout weighs 1
    advantages: torch.Tensor  # float32 [tokens]: of the rollout
    engine_log_probs: torch.Tensor  # float32 [tokens]: as the engine drew it
    old_log_probs: torch.Tensor  # float32 [tokens]: by the policy that is trained, before the first update
    importance: torch.Tensor  # float32 [tokens]: factor that corrects for the engine's mismatch


@dataclass(frozen=True)
class LearnedRollout:
    """A rollout with its advantage and its prompt."""

    prompt: EncodedSample
    rollout: Rollout
    advantage: float

    def __len__(self) -> int:
        return len(self.prompt) + len(self.rollout.tokens)

    @property
    def drawn(self) -> np.ndarray:
        """Which tokens of the response the policy drew, and so learns: bool [response tokens]."""
        return ~self.rollout.inserted


def encode_rollout(learned: LearnedRollout, image_id: int, pad_id: int) -> tuple[EncodedSample, np.ndarray]:
    """Return a rollout as a sample, and its tokens as labels.

    A media token that the policy drew has no embedding to be replaced by: it is a label and never an input.

    Args:
        learned: the rollout.
        image_id: the token that stands for a piece of an image.
        pad_id: the padding token.

    Returns:
        The sample; int64 [tokens], what its labels are taken from.
    """
    prompt, rollout = learned.prompt, learned.rollout
    labels = np.concatenate([prompt.input_ids, rollout.tokens])
    inputs = labels.copy()
    if rollout.finish == "media":
        inputs[-1] = pad_id
    sample = EncodedSample(
        sample_id=f"{rollout.prompt_id}#{rollout.number}",
        domain=prompt.domain,
        input_ids=inputs,
        loss=np.concatenate([np.zeros(len(prompt), bool), learned.drawn]),
        position_ids=rope_positions(inputs == image_id, prompt.grids),
        patches=prompt.patches,
        grids=prompt.grids,
        frames_per_image=prompt.frames_per_image,
    )
    return sample, labels


def make_policy_batch(
    rollouts: Sequence[LearnedRollout],
    *,
    seq_length: int,
    segment_multiple: int,
    image_id: int,
    pad_id: int,
    sources: Sequence[str] = (),
) -> PolicyBatch:
    """Lay rollouts one after the other. `old_log_probs` and `importance` are still to be computed: 0 and 1.

    Args:
        rollouts: They must fit seq_length.
        seq_length: Tokens of the pack.
        segment_multiple: Tokens; each rollout is padded to a multiple.
        image_id: The token that stands for a piece of an image.
        pad_id: The padding token.
        sources: Label of the source of each rollout.
    """
    encoded = [encode_rollout(learned, image_id, pad_id) for learned in rollouts]
    pack = collate(
        [sample for sample, _ in encoded],
        seq_length=seq_length,
        segment_multiple=segment_multiple,
        pad_id=pad_id,
        segment_sources=sources or None,
    )
    pack.routed_experts = _lay_out_experts([learned.rollout.experts for learned in rollouts], pack)
    weights, advantages, engine_log_probs = np.zeros((3, seq_length), np.float32)
    for learned, (_, labels), begin in zip(rollouts, encoded, pack.cu_seqlens.tolist(), strict=False):
        first = begin + len(learned.prompt) - 1  # this place predicts the first token of the response
        places = first + np.flatnonzero(learned.drawn)
        weights[places] = 1 / len(places)
        advantages[places] = learned.advantage
        engine_log_probs[places] = learned.rollout.log_probs[learned.drawn]
        pack.labels[begin : begin + len(labels) - 1] = torch.from_numpy(labels[1:])
    return PolicyBatch(
        **{item.name: getattr(pack, item.name) for item in fields(Batch)},
        weights=torch.from_numpy(weights),
        advantages=torch.from_numpy(advantages),
        engine_log_probs=torch.from_numpy(engine_log_probs),
        old_log_probs=torch.zeros(seq_length),
        importance=pack.loss_mask.clone(),
    )


def _lay_out_experts(experts: Sequence[RoutedExperts | None], pack: Batch) -> torch.Tensor | None:
    """Return the experts that the engine chose for a pack's tokens, None if it has not told any.

    Routers choose for themselves where it has read nothing: at padding, and at the last token of each response.
    """
    told = [each for each in experts if each is not None]
    if not told:
        return None
    laid_out = np.full((len(pack.input_ids), *told[0].response.shape[1:]), NOT_ROUTED, np.uint8)
    for each, begin in zip(experts, pack.cu_seqlens.tolist(), strict=False):
        if each is not None:
            both = np.concatenate([each.prompt, each.response])
            laid_out[begin : begin + len(both)] = both
    return torch.from_numpy(laid_out)
