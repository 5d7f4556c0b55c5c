"""Which rank runs the vision tower on which image of a pack, and how embeddings reach their image tokens.

The tensor and context ranks of the first pipeline stage work on the same pack. Each token belongs to one rank, and each
image is computed by one rank. The tokens of an image may belong to any rank, so the ranks exchange rows of embeddings
once, after the tower. No rank receives a row that it does not need. An example with four images on two ranks:

    tower          rank 0: A A A A  C C          rank 1: B B B  D D D
    tokens         rank 0: . A A A A . B B       rank 1: B . C C . D D D
    rank 0 sends   A A A A to itself, C C to rank 1;    rank 1 sends B B to rank 0, B D D D to itself

The backward pass sends the whole gradient of each row back to the rank that computed it. The exchange table is built on
the host from what every rank knows (token ids and grids), so the exchange does not wait for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import all_to_all, copy_to_tensor_model_parallel_region
from torch import Tensor

from model.config import VisionConfig
from model.context_slicing import context_tokens
from model.errors import ImageTokenError
from model.flops import image_cost
from model.image_assignment import assign_images
from model.image_constants import MERGE_SIZE
from model.to_device import to_device

NO_RANK = -1  # of a token that takes no part in this rank's exchange


# --- image tokens -----------------------------------------------------------------------------------------------------


def image_token_positions(input_ids: Tensor, image_token_id: int, grid_thw: Tensor) -> Tensor:
    """Return the positions of the image tokens of a pack, after checking them against the grids, image by image.

    Every image, and every frame pair of a video, has one run of consecutive image tokens. Begin and end tokens separate
    the runs.

    Args:
        input_ids: int64 [tokens], in main memory.
        image_token_id: Id of the image token.
        grid_thw: int64 [images, 3], each (1, h, w) in patches.

    Returns:
        int64 [image tokens].

    Raises:
        ImageTokenError: An image has more or fewer image tokens than its grid needs.
    """
    is_image = input_ids == image_token_id
    outside = torch.zeros(1, dtype=torch.int8)
    edges = torch.diff(is_image.to(torch.int8), prepend=outside, append=outside)
    found = (edges == -1).nonzero().squeeze(1) - (edges == 1).nonzero().squeeze(1)  # tokens of each run
    needed = grid_thw.prod(dim=1) // MERGE_SIZE**2
    if not torch.equal(found, needed):
        raise ImageTokenError(_describe_mismatch(found.tolist(), needed.tolist()))
    return is_image.nonzero().squeeze(1)


def _describe_mismatch(found: list[int], needed: list[int]) -> str:
    """Name the first image whose run does not fit."""
    both = min(len(found), len(needed))
    image = next((n for n in range(both) if found[n] != needed[n]), both)
    if image == len(needed):
        return f"input_ids has more runs of image tokens ({len(found)}) than the pack has images ({len(needed)})"
    tokens = found[image] if image < len(found) else 0
    return (
        f"image {image + 1} has {tokens} image tokens in input_ids, its grid needs {needed[image]} "
        f"(runs of image tokens: {len(found)}, images in the pack: {len(needed)})"
    )


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExchangeTable:
    """Which rows of embeddings one rank sends to and receives from each rank of its group, for one pack.

    All tensors are int64 and in main memory.
    """

    images: Tensor  # [images of this rank], whose embeddings this rank computes, ascending
    sent_rows: Tensor  # [rows sent], rows of those embeddings, grouped by receiving rank
    sent_counts: list[int]  # rows sent to each rank
    received_positions: Tensor  # [rows received], the position of each received row among this rank's tokens
    received_counts: list[int]  # rows received from each rank


def build_exchange_table(
    image_tokens: Tensor,
    rows_of_image: Tensor,
    rank_of_image: Tensor,
    rank_of_token: Tensor,
    position_of_token: Tensor,
    rank: int,
    ranks: int,
) -> ExchangeTable:
    """Build the table of `rank`. All tensors are int64.

    Args:
        image_tokens: [rows], positions of the pack's image tokens, ascending; row i belongs to image token i.
        rows_of_image: [images], embeddings of each image.
        rank_of_image: [images], the rank that runs the tower on each image.
        rank_of_token: [tokens], the rank that has each token, or NO_RANK.
        position_of_token: [tokens], position of each token among the tokens of its rank.
        rank: The rank whose table is built.
        ranks: Size of the group.
    """
    sender = rank_of_image.repeat_interleave(rows_of_image)
    receiver = rank_of_token[image_tokens]
    computed = (sender == rank).nonzero().squeeze(1)
    sent = torch.arange(len(computed))[receiver[computed] != NO_RANK]
    sent = sent[receiver[computed[sent]].argsort(stable=True)]
    received = (receiver == rank).nonzero().squeeze(1)
    received = received[sender[received].argsort(stable=True)]
    return ExchangeTable(
        images=(rank_of_image == rank).nonzero().squeeze(1),
        sent_rows=sent,
        sent_counts=receiver[computed[sent]].bincount(minlength=ranks).tolist(),
        received_positions=position_of_token[image_tokens[received]],
        received_counts=sender[received].bincount(minlength=ranks).tolist(),
    )


# --- the exchange -----------------------------------------------------------------------------------------------------


class EmbeddingExchange:
    """The exchange of embeddings among the ranks that work on one pack, for either value of `ParallelConfig.vision`.

    images   Every tensor and context rank runs the whole tower on its share of the images.
    tensor   Tensor ranks split the tower's layers, so each has all rows of its context rank. It sends the rows of the
             tokens that it has itself.
    """

    def __init__(self, vision: VisionConfig, sharding: str) -> None:
        self.vision = vision
        self.by_images = sharding == "images"
        self.tensor_ranks = parallel_state.get_tensor_model_parallel_world_size()
        self.context_ranks = parallel_state.get_context_parallel_world_size()
        self.group: dist.ProcessGroup = (
            parallel_state.get_tensor_and_context_parallel_group()
            if self.by_images
            else parallel_state.get_context_parallel_group()
        )

    def table(self, input_ids: Tensor, image_token_id: int, grid_thw: Tensor, cu_seqlens: Tensor) -> ExchangeTable:
        """Build this rank's exchange table of a whole pack, whose tensors are in main memory.

        Raises:
            ImageTokenError: An image has more or fewer image tokens than its grid needs.
        """
        image_tokens = image_token_positions(input_ids, image_token_id, grid_thw)
        costs = [image_cost(self.vision, h, w) for _, h, w in grid_thw.tolist()]
        rank_of_image = torch.zeros(len(costs), dtype=torch.int64)
        for rank, images in enumerate(assign_images(costs, self.group.size())):
            rank_of_image[images] = rank
        rank_of_token, position_of_token = self._tokens_of_ranks(cu_seqlens)
        return build_exchange_table(
            image_tokens,
            grid_thw.prod(dim=1) // MERGE_SIZE**2,
            rank_of_image,
            rank_of_token,
            position_of_token,
            self.group.rank(),
            self.group.size(),
        )

    def _tokens_of_ranks(self, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rank of the group that has each token, and the token's position there: both [tokens].

        A tensor rank has a contiguous part of its context rank's tokens.
        """
        rank_of_token = torch.full((int(cu_seqlens[-1]),), NO_RANK)
        position_of_token = torch.zeros_like(rank_of_token)
        own_tensor_rank = parallel_state.get_tensor_model_parallel_rank()
        for context_rank in range(self.context_ranks):
            tokens = context_tokens(cu_seqlens, self.context_ranks, context_rank)
            for tensor_rank, part in enumerate(tokens.chunk(self.tensor_ranks)):
                if self.by_images:
                    rank_of_token[part] = context_rank * self.tensor_ranks + tensor_rank
                elif tensor_rank == own_tensor_rank:
                    rank_of_token[part] = context_rank
                position_of_token[part] = torch.arange(len(part))
        return rank_of_token, position_of_token

    def send(self, table: ExchangeTable, computed: Tensor) -> Tensor:
        """Send the embeddings that this rank computed to the ranks that have their tokens.

        Collective, in the backward pass too.

        Args:
            table: This rank's table of the pack.
            computed: [rows computed, hidden].

        Returns:
            [rows received, hidden], the embeddings at `table.received_positions`.
        """
        if self.by_images:
            computed = _TensorAverage.apply(computed, self.tensor_ranks)
        else:
            computed = copy_to_tensor_model_parallel_region(computed)  # one tensor rank has each row's gradient: sum
        sent = computed.index_select(0, to_device(table.sent_rows))
        return all_to_all(self.group, sent, table.received_counts, table.sent_counts)


class _TensorAverage(torch.autograd.Function):
    """The identity; its gradient is multiplied by the number of tensor ranks.

    Each tensor rank has a part of the tower's gradient. megatron-core averages over tensor ranks the gradients of
    parameters marked `average_gradients_across_tp_domain`; this makes the average a sum.
    """

    @staticmethod
    def forward(ctx, x: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.ranks, None
