"""Router replay: routers choose the experts that somebody else has chosen, and weigh them by their own scores.

An engine that draws rollouts computes with other kernels than the model that is trained. Where two experts have nearly
the same score the two may choose differently, and the log-probabilities of such a token differ far more than by
rounding. With the engine's choice they do not. Scores, their normalisation, and so the router's gradient are those of
the model itself.

The choice reaches every router, recomputed ones included, in the table of members that `model.moe` describes. Below the
rows of the segments each router of the pipeline stage has one row per chosen expert. Two routers, top-2:

    members             1 1 1 1 0 0
                        0 0 0 0 1 0     the last token is padding
    experts, router 0   3 0 5 - 1 -     - the router chooses for itself
                        7 2 6 - 4 -
    experts, router 1   0 4 4 - 2 -
                        1 5 3 - 6 -

The table is uint8 without experts, and int16 with them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NOT_ROUTED = 255  # stands for an expert where nobody has chosen any for a token
MAX_EXPERTS = NOT_ROUTED  # of a layer, so that their numbers are below it


def with_routed_experts(members: Tensor, experts: Tensor) -> Tensor:
    """Return the table of members with the experts that routers are to choose.

    Args:
        members: uint8 [segments, tokens].
        experts: uint8 [tokens, routers, experts per token]; NOT_ROUTED in all places of a token: routers choose.

    Returns:
        int16 [segments + routers * experts per token, tokens].

    >>> with_routed_experts(torch.ones(1, 2, dtype=torch.uint8), torch.tensor([[[3, 7]], [[255, 255]]])).tolist()
    [[1, 1], [3, 255], [7, 255]]
    """
    return torch.cat([members.short(), experts.short().flatten(1).T])


def split_table(table: Tensor, topk: int, place: int, places: int) -> tuple[Tensor, Tensor | None]:
    """Return the table of members, and the experts that one of the stage's routers is to choose.

    Args:
        table: As from `with_routed_experts`, or without experts.
        topk: Experts per token.
        place: Of the router in its stage.
        places: Routers of the stage.

    Returns:
        [segments, tokens]; int64 [tokens, experts per token], None for a table without experts.
    """
    if table.dtype != torch.int16:
        return table, None
    segments = table.size(0) - places * topk
    own = segments + place * topk
    return table[:segments], table[own : own + topk].T.long()


@dataclass(frozen=True)
class Chosen:
    """What megatron-core asks for experts in place of its own top-k, as its `router_replay`.

    Attributes:
        experts: int64 [tokens, experts per token], from `split_table`.
    """

    experts: Tensor

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Return the scores of the chosen experts, and the experts: both [tokens, topk].

        Args:
            scores: [tokens, experts], by which the router itself would choose.
            topk: Experts per token.
            num_groups: Groups of experts; megatron-core passes it.
            group_topk: Likewise.
            default_compute_topk: The router's own choice.
        """
        _, own = default_compute_topk(scores, topk, num_groups, group_topk)
        experts = torch.where(self.experts[:, :1] == NOT_ROUTED, own, self.experts)
        return scores.gather(1, experts), experts
