"""megatron-core's mixture-of-experts layer, with a router that knows the segments of a pack and their padding.

megatron-core counts padding in the balance loss and in the statistics that move the expert bias, so padding would
change the training. It also treats a whole pack as one sequence. Here both are computed per segment, from a table of
the useful tokens of each segment:

    members     1 1 1 1 0 0 0 0 0 0 0 0      first segment
                0 0 0 0 1 1 0 0 0 0 0 0      second segment, followed by two tokens of padding
                0 0 0 0 0 0 0 0 1 1 1 0      third segment

The table is passed in megatron-core's argument `padding_mask`, which reaches every layer, recomputed layers included.
Where the example has 1, it holds what the token stands for: 1 text, 2 a part of an image, 3 a part of a video. So loads
are counted for each of these MODALITIES.

With router replay (`model.routed_experts`) the experts that each router is to choose are below these rows.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    compute_routing_scores_for_aux_loss,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from model.megatron_versions import SORTS_ANY_NUMBER, record_loss
from model.routed_experts import Chosen, split_table

BALANCE_LOSS = "balance_loss"
MODALITIES = ("text", "image", "video")  # the table of members holds 1 + the index of a token's modality


def normalized_topk_routing(
    logits: Tensor, topk: int, *, scaling_factor: float, **options: Any
) -> tuple[Tensor, Tensor]:
    """Route as megatron-core does, and also normalise the weight of a single expert, which it leaves as it is.

    With top-1, transformers gives the one expert the weight `scaling_factor`.
    """
    probs, routing_map = topk_routing_with_score_function(logits, topk, scaling_factor=scaling_factor, **options)
    if topk == 1:
        probs = probs / (probs.sum(1, keepdim=True) + 1e-20) * scaling_factor
    return probs, routing_map


class SegmentRouter(TopKRouter):
    """Sigmoid top-k routing with an expert bias that affects the choice of experts but not their weights.

    Source: report, section 3.2; DeepSeek-V3, arXiv 2412.19437, equations 12 to 20. The sequence-level balance loss of a
    segment of T tokens, with E experts of which K are chosen, is

        L = E / (K T) * sum_e  count_e * mean_t(score_te)

    Segments are weighted by their tokens, and the sum is divided by the useful tokens of the GLOBAL batch, so that
    neither packing nor layout changes the loss.

    Attributes:
        balance_loss_coeff: Weight of the balance loss.
        mean_tokens_per_pack: Useful tokens of the global batch per pack. The training loop sets it at every step.
            (The schedules divide by the number of micro-batches, and DDP by the data-parallel size.)
        local_tokens_by_modality: This rank's tokens per modality and expert; the training loop reads and clears it.
        place: Among the routers of this pipeline stage, from 0.
        places: How many routers this stage has.
    """

    place, places = 0, 1

    def __init__(self, config: Any, pg_collection: Any, **_: Any) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.balance_loss_coeff = float(config.moe_aux_loss_coeff)
        self.mean_tokens_per_pack = 1.0
        counts = torch.zeros(len(MODALITIES), self.num_experts, device=torch.cuda.current_device())
        self.register_buffer("local_tokens_by_modality", counts, persistent=False)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose the experts of each token.

        Args:
            logits: [tokens, 1, experts].
            padding_mask: The table of members, uint8 [segments, tokens]; or that table with chosen experts.

        Returns:
            Probabilities (float32) and chosen experts (bool), both [tokens, experts]. Padding has no experts, unless
            tokens are sorted into a number of rows that must be known beforehand.
        """
        assert padding_mask is not None, "the router needs the table of segment members"
        logits = logits.flatten(0, 1)
        members, experts = split_table(padding_mask, self.topk, self.place, self.places)
        probs, routing_map = normalized_topk_routing(
            logits,
            self.topk,
            scaling_factor=self.config.moe_router_topk_scaling_factor,
            score_function=self.score_function,
            expert_bias=self.expert_bias,
            router_replay=None if experts is None else Chosen(experts),
        )
        # With recompute the forward pass runs twice, the first time without gradients: count only once.
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                self._count(members.amax(0), routing_map)
            if self.balance_loss_coeff:
                probs = self._add_balance_loss(probs, logits, members=members)
        if SORTS_ANY_NUMBER and not self.config.moe_permute_fusion:
            routing_map = routing_map & (members.amax(0) != 0)[:, None]
        return probs, routing_map

    def _count(self, modalities: Tensor, routing_map: Tensor) -> None:
        """Add the experts [tokens, experts] of useful tokens, whose modality is uint8 [tokens], to the counts."""
        numbers = torch.arange(1, len(MODALITIES) + 1, device=modalities.device)
        dtype = self.local_tokens_by_modality.dtype
        counts = (modalities == numbers[:, None]).to(dtype) @ routing_map.to(dtype)  # [modalities, experts]
        self.local_tokens_by_modality += counts
        self.local_tokens_per_expert += counts.sum(0)

    def _add_balance_loss(self, probs: Tensor, logits: Tensor, members: Tensor) -> Tensor:
        """Attach this rank's part of the balance loss to `probs`, whose backward pass then adds its gradient.

        Under sequence and context parallelism a rank has some of a segment's tokens. Counts are summed over ranks,
        scores are not: the ranks' parts of the loss, and of the router's gradient, add up.
        """
        chosen, scores = compute_routing_scores_for_aux_loss(logits, self.topk, self.score_function)
        with torch.no_grad():
            is_member = (members != 0).to(scores.dtype)
            counts = is_member @ chosen.to(scores.dtype)  # [segments, experts]
            if self.tp_cp_group.size() > 1:
                torch.distributed.all_reduce(counts, group=self.tp_cp_group)
            tokens = (counts.sum(1, keepdim=True) / self.topk).clamp(min=1)
            weights = is_member.T @ (counts * self.num_experts / (self.topk * tokens))  # [tokens, experts]
        loss = (scores * weights).sum() / self.mean_tokens_per_pack
        record_loss(BALANCE_LOSS, loss, self.layer_number, self.config.num_layers)
        return MoEAuxLossAutoScaler.apply(probs, loss * self.balance_loss_coeff)


class SegmentMoELayer(MoELayer):
    """megatron-core's layer, which passes the table of members to the router as `padding_mask`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        dispatcher = self.token_dispatcher
        if isinstance(dispatcher, MoEAlltoAllTokenDispatcher) and dispatcher.ep_size * dispatcher.tp_size == 1:
            # With more than one local expert, megatron-core sorts what it received by expert, and back. Here the tokens
            # come from one rank, sorted.
            dispatcher.num_local_experts = 1

    def forward(
        self, hidden_states: Tensor, intermediate_tensors: None = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Run router, routed experts and shared experts.

        Args:
            hidden_states: [tokens, 1, hidden].
            intermediate_tensors: Unused, megatron-core passes it.
            padding_mask: The table of members, uint8 [segments, tokens].

        Returns:
            [tokens, 1, hidden], and None for megatron-core's bias.
        """
        shared_expert_output = self.shared_experts_compute(hidden_states)
        probs, routing_map = self.route(hidden_states, padding_mask)
        hidden_states, probs = self.preprocess(hidden_states, probs, routing_map)
        dispatched, probs = self.dispatch(hidden_states, probs)
        output, _ = self.routed_experts_compute(dispatched, probs)
        return self.postprocess(self.combine(output), shared_expert_output), None
