"""Which rank works on which tokens and images: against brute force, on cases small enough for it."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from model.image_exchange import NOBODY, plan_exchange
from model.parallel import context_tokens

pytestmark = pytest.mark.fast


def test_the_example_of_context_tokens() -> None:
    bounds = torch.tensor([0, 8, 12])
    assert context_tokens(bounds, 2, 0).tolist() == [0, 1, 6, 7, 8, 11]
    assert context_tokens(bounds, 2, 1).tolist() == [2, 3, 4, 5, 9, 10]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_context_tokens_cut_every_segment_in_mirrored_pieces(ranks: int) -> None:
    rng = random.Random(ranks)
    lengths = [2 * ranks * rng.randint(1, 5) for _ in range(rng.randint(1, 9))]
    bounds = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    keys_seen = []
    for rank in range(ranks):
        expected: list[int] = []
        for begin, length in zip(bounds, lengths, strict=False):
            tokens = list(range(begin, begin + length))
            pieces = [tokens[n * length // (2 * ranks) : (n + 1) * length // (2 * ranks)] for n in range(2 * ranks)]
            expected += pieces[rank] + pieces[2 * ranks - 1 - rank]
        assert context_tokens(torch.tensor(bounds), ranks, rank).tolist() == expected
        keys_seen.append(sum(token - max(b for b in bounds if b <= token) + 1 for token in expected))
    assert len(set(keys_seen)) == 1  # all ranks do the same amount of causal attention


def test_a_segment_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match=r"segments of \[8, 6\] tokens cannot be cut into 4 equal pieces"):
        context_tokens(torch.tensor([0, 8, 14]), 2, 0)


@pytest.mark.parametrize("seed", range(40))
def test_every_token_gets_its_embedding(seed: int) -> None:
    """The exchange, played on one process with numbered rows."""
    rng = random.Random(seed)
    ranks, images = rng.randint(1, 5), rng.randint(0, 7)
    rows_of_image = torch.tensor([rng.randint(1, 6) for _ in range(images)], dtype=torch.int64)
    rows = int(rows_of_image.sum())
    tokens = rows + rng.randint(0, 20)
    image_tokens = torch.tensor(sorted(rng.sample(range(tokens), rows)), dtype=torch.int64)
    maker = torch.tensor([rng.randrange(ranks) for _ in range(images)], dtype=torch.int64)
    holder = torch.tensor([rng.choice([NOBODY, *range(ranks)]) for _ in range(tokens)], dtype=torch.int64)
    place = torch.zeros(tokens, dtype=torch.int64)
    for rank in range(ranks):
        place[holder == rank] = torch.arange(int((holder == rank).sum()))

    plans = [plan_exchange(image_tokens, rows_of_image, maker, holder, place, rank, ranks) for rank in range(ranks)]
    number = torch.arange(rows).split(rows_of_image.tolist())
    sent: list[list[Tensor]] = []  # by sender, by receiver
    for rank, plan in enumerate(plans):
        assert plan.images.tolist() == [image for image in range(images) if maker[image] == rank]
        made = torch.cat([torch.empty(0, dtype=torch.int64), *(number[image] for image in plan.images.tolist())])
        sent.append(list(made[plan.sent].split(plan.sent_sizes)))
    for rank, plan in enumerate(plans):
        received = [sent[other][rank] for other in range(ranks)]
        assert [len(part) for part in received] == plan.received_sizes
        own = torch.full((int((holder == rank).sum()),), -1)
        own[plan.places] = torch.cat(received)
        row_of_token = {token: row for row, token in enumerate(image_tokens.tolist())}
        assert own.tolist() == [row_of_token.get(t, -1) for t in range(tokens) if holder[t] == rank]
