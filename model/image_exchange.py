"""Which rank runs the vision tower on which image of a pack, and how embeddings get to the tokens they stand for.

The tensor and context ranks of the first stage share a pack's tokens, each token on one rank, and they share its
images, each image on one rank. An image's tokens may lie anywhere, so after the tower the ranks exchange rows, once,
and nobody ever holds an embedding that it does not need. With four images on two ranks:

    tower          rank 0: A A A A  C C          rank 1: B B B  D D D
    tokens         rank 0: . A A A A . B B       rank 1: B . C C . D D D
    rank 0 sends   A A A A to itself, C C to rank 1;    rank 1 sends B B to rank 0, B D D D to itself

The backward sends every row's whole gradient to the rank that made it. All this is planned on the host, from what every
rank knows (token ids, grids), so that the exchange waits for no device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import all_to_all, copy_to_tensor_model_parallel_region
from torch import Tensor

from model.config import VisionConfig
from model.flops import image_cost
from model.image_split import split_images
from model.parallel import context_tokens

NOBODY = -1


@dataclass(frozen=True)
class ImageExchange:
    """This rank's part of one pack's images. All tensors are int64 and in main memory.

    `images`: the images whose embeddings this rank makes, ascending.
    `sent`: rows of those embeddings, in the order in which they go out; `sent_sizes`: how many to each rank.
    `places`: where each received row goes among this rank's tokens; `received_sizes`: how many from each rank.
    """

    images: Tensor
    sent: Tensor
    sent_sizes: list[int]
    places: Tensor
    received_sizes: list[int]


def plan_exchange(
    image_tokens: Tensor, rows_of_image: Tensor, maker: Tensor, holder: Tensor, place: Tensor, rank: int, ranks: int
) -> ImageExchange:
    """The part of `rank`.

    Args:
        image_tokens: [rows], the pack's image tokens in order; row i is the embedding that token i stands for.
        rows_of_image: [images].
        maker: [images], the rank that runs the tower on each image.
        holder: [tokens], the rank that has each token (NOBODY: this exchange leaves it alone).
        place: [tokens], where it lies among that rank's tokens.
    """
    row_maker = maker.repeat_interleave(rows_of_image)
    row_holder = holder[image_tokens]
    made = (row_maker == rank).nonzero().squeeze(1)
    sent = torch.arange(len(made))[row_holder[made] != NOBODY]
    sent = sent[row_holder[made[sent]].argsort(stable=True)]
    received = (row_holder == rank).nonzero().squeeze(1)
    received = received[row_maker[received].argsort(stable=True)]
    return ImageExchange(
        images=(maker == rank).nonzero().squeeze(1),
        sent=sent,
        sent_sizes=row_holder[made[sent]].bincount(minlength=ranks).tolist(),
        places=place[image_tokens[received]],
        received_sizes=row_maker[received].bincount(minlength=ranks).tolist(),
    )


class ImageSharing:
    """The exchange among the ranks of one pack, in one of the two ways of `ParallelConfig.vision`.

    images   every tensor and context rank runs the whole tower on its share of the images
    tensor   tensor ranks run the tower's layers together, so each has all rows that its context rank makes; it passes
             on those of the tokens that it has
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

    def plan(self, input_ids: Tensor, image_token_id: int, grid_thw: Tensor, cu_seqlens: Tensor) -> ImageExchange:
        """This rank's part of a pack's images. All arguments are in main memory.

        Raises:
            ValueError: image tokens and image embeddings do not match in number.
        """
        image_tokens = (input_ids == image_token_id).nonzero().squeeze(1)
        rows_of_image = grid_thw.prod(dim=1) // self.vision.spatial_merge_size**2
        if len(image_tokens) != int(rows_of_image.sum()):
            raise ValueError(
                f"the pack has {len(image_tokens)} image tokens but its images make {int(rows_of_image.sum())} "
                "embeddings"
            )
        costs = [image_cost(self.vision, h, w) for _, h, w in grid_thw.tolist()]
        maker = torch.zeros(len(costs), dtype=torch.int64)
        for rank, images in enumerate(split_images(costs, self.group.size())):
            maker[images] = rank
        holder, place = self._holders(cu_seqlens)
        return plan_exchange(image_tokens, rows_of_image, maker, holder, place, self.group.rank(), self.group.size())

    def _holders(self, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """The rank of the group that has each token, and where: both [tokens]. A tensor rank has a contiguous part of
        its context rank's tokens."""
        holder = torch.full((int(cu_seqlens[-1]),), NOBODY)
        place = torch.zeros_like(holder)
        mine = parallel_state.get_tensor_model_parallel_rank()
        for context_rank in range(self.context_ranks):
            tokens = context_tokens(cu_seqlens, self.context_ranks, context_rank)
            for tensor_rank, part in enumerate(tokens.chunk(self.tensor_ranks)):
                if self.by_images:
                    holder[part] = context_rank * self.tensor_ranks + tensor_rank
                elif tensor_rank == mine:
                    holder[part] = context_rank
                place[part] = torch.arange(len(part))
        return holder, place

    def exchange(self, plan: ImageExchange, made: Tensor) -> Tensor:
        """Send the embeddings that this rank has made [rows, hidden] to where their tokens are. Returns those of its
        own tokens, for `plan.places`. Collective, in the backward too."""
        if self.by_images:
            made = _TensorAverage.apply(made, self.tensor_ranks)
        else:
            made = copy_to_tensor_model_parallel_region(made)  # the rows' gradients are each on one tensor rank: add up
        sent = made.index_select(0, plan.sent.to(made.device, non_blocking=True))
        return all_to_all(self.group, sent, plan.received_sizes, plan.sent_sizes)


class _TensorAverage(torch.autograd.Function):
    """The identity, whose gradient is multiplied by the number of tensor ranks: each has a part of the tower's
    gradient, and megatron-core averages over them what is marked `average_gradients_across_tp_domain`."""

    @staticmethod
    def forward(ctx, x: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.ranks, None
