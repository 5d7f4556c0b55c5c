"""The mixture-of-experts layer: megatron-core's, with a router that knows which tokens are padding and which belong
together.

megatron-core counts padding in the balance loss and in the statistics that move the expert bias, so that a different
padding is a different training; and it takes a whole pack for one sequence. Here both are per sample, from a table of
which tokens each sample has:

    members     1 1 1 1 0 0 0 0 0 0 0 0      first sample
                0 0 0 0 1 1 0 0 0 0 0 0      second sample, then two tokens of padding
                0 0 0 0 0 0 0 0 1 1 1 0      third sample

It travels in the argument that megatron-core calls `padding_mask`, which reaches every layer, also when a layer is
recomputed.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    compute_routing_scores_for_aux_loss,
    save_to_aux_losses_tracker,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

BALANCE_LOSS = "balance_loss"


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
    """Sigmoid top-k routing with an expert bias that only decides the choice (report, section 3.2; DeepSeek-V3,
    arXiv 2412.19437, equations 12 to 20).

    `balance_loss_coeff` weighs the sequence-level balance loss of a sample of T tokens, E experts and K choices:

        L = E / (K T) * sum_e  count_e * mean_t(score_te)

    Samples are weighted by their tokens, and the whole is divided by the useful tokens of the GLOBAL batch, so that
    neither the packing nor the layout changes it. `mean_tokens_per_pack` is that division as the schedules need it
    (they divide by the number of micro-batches, DDP by the data-parallel size); the training loop sets it every step.
    """

    def __init__(self, config: Any, pg_collection: Any) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.balance_loss_coeff = float(config.moe_aux_loss_coeff)
        self.mean_tokens_per_pack = 1.0

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """logits [tokens, 1, experts], padding_mask: members [segments, tokens] -> probabilities (float32) and choice
        (bool), both [tokens, experts]."""
        assert padding_mask is not None, "the router needs to know which tokens each sample has"
        logits = logits.flatten(0, 1)
        probs, routing_map = normalized_topk_routing(
            logits,
            self.topk,
            scaling_factor=self.config.moe_router_topk_scaling_factor,
            score_function=self.score_function,
            expert_bias=self.expert_bias,
        )
        # With recompute the forward runs twice, the first time without gradients: count and charge once.
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                self.local_tokens_per_expert += padding_mask.any(0).to(probs.dtype) @ routing_map.to(probs.dtype)
            if self.balance_loss_coeff:
                probs = self._charge_balance_loss(probs, logits, members=padding_mask)
        return probs, routing_map

    def _charge_balance_loss(self, probs: Tensor, logits: Tensor, members: Tensor) -> Tensor:
        """Attach this rank's part of the balance loss to `probs`, whose backward then adds its gradient.

        Under sequence parallelism a rank has some of a sample's tokens: the counts are summed over ranks, the scores
        are not, and the ranks' parts of the loss (and of the router's gradient) add up.
        """
        chosen, scores = compute_routing_scores_for_aux_loss(logits, self.topk, self.score_function)
        with torch.no_grad():
            of_segment = members.to(scores.dtype)
            counts = of_segment @ chosen.to(scores.dtype)  # [segments, experts]
            if self.tp_cp_group.size() > 1:
                torch.distributed.all_reduce(counts, group=self.tp_cp_group)
            tokens = (counts.sum(1, keepdim=True) / self.topk).clamp(min=1)
            weights = of_segment.T @ (counts * self.num_experts / (self.topk * tokens))  # [tokens, experts]
        loss = (scores * weights).sum() / self.mean_tokens_per_pack
        save_to_aux_losses_tracker(BALANCE_LOSS, loss, self.layer_number, self.config.num_layers)
        return MoEAuxLossAutoScaler.apply(probs, loss * self.balance_loss_coeff)


class SegmentMoELayer(MoELayer):
    """megatron-core's layer, whose `forward` takes the table of members for a mask of padding."""

    def forward(
        self, hidden_states: Tensor, intermediate_tensors: None = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """hidden_states [tokens, 1, hidden], padding_mask: members [segments, tokens] -> [tokens, 1, hidden], None."""
        shared_expert_output = self.shared_experts_compute(hidden_states)
        probs, routing_map = self.route(hidden_states, padding_mask)
        hidden_states, probs = self.preprocess(hidden_states, probs, routing_map)
        dispatched, probs = self.dispatch(hidden_states, probs)
        output, _ = self.routed_experts_compute(dispatched, probs)
        return self.postprocess(self.combine(output), shared_expert_output), None
