"""Which rank works on which tokens and images, compared with brute force on small cases."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from model.context_slicing import context_tokens
from model.embedding_exchange import NO_RANK, build_exchange_table, image_token_positions

pytestmark = pytest.mark.fast


# --- tokens of context ranks ------------------------------------------------------------------------------------------


def test_context_tokens_of_the_docstring_example() -> None:
    boundaries = torch.tensor([0, 8, 12])
    assert context_tokens(boundaries, 2, 0).tolist() == [0, 1, 6, 7, 8, 11]
    assert context_tokens(boundaries, 2, 1).tolist() == [2, 3, 4, 5, 9, 10]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_context_ranks_get_mirrored_chunks_of_every_segment(ranks: int) -> None:
    rng = random.Random(ranks)
    lengths = [2 * ranks * rng.randint(1, 5) for _ in range(rng.randint(1, 9))]
    boundaries = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    visible_keys = []
    for rank in range(ranks):
        expected: list[int] = []
        for begin, length in zip(boundaries, lengths, strict=False):
            tokens = list(range(begin, begin + length))
            chunks = [tokens[n * length // (2 * ranks) : (n + 1) * length // (2 * ranks)] for n in range(2 * ranks)]
            expected += chunks[rank] + chunks[2 * ranks - 1 - rank]
        assert context_tokens(torch.tensor(boundaries), ranks, rank).tolist() == expected
        visible_keys.append(sum(token - max(b for b in boundaries if b <= token) + 1 for token in expected))
    assert len(set(visible_keys)) == 1  # all ranks do the same amount of causal attention


def test_segment_that_cannot_be_cut_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"segments of \[8, 6\] tokens cannot be cut into 4 equal chunks"):
        context_tokens(torch.tensor([0, 8, 14]), 2, 0)


# --- image tokens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_image_tokens_are_found_where_they_are(seed: int) -> None:
    """Runs at the beginning and the end of the tokens among them."""
    rng = random.Random(seed)
    image_token = 7
    grids = [(2 * rng.randint(1, 4), 2 * rng.randint(1, 4)) for _ in range(rng.randint(0, 6))]
    ids = [1] * rng.randint(0, 2)
    expected: list[int] = []
    for h, w in grids:
        expected += range(len(ids), len(ids) + h * w // 4)
        ids += [image_token] * (h * w // 4) + [2] * rng.randint(1, 3)
    if rng.random() < 0.5 and expected:
        ids = ids[: expected[-1] + 1]
    grid_thw = torch.tensor([(1, h, w) for h, w in grids], dtype=torch.int64).view(-1, 3)
    positions = image_token_positions(torch.tensor(ids, dtype=torch.int64), image_token, grid_thw)
    assert positions.tolist() == expected


# --- exchange of embeddings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_every_image_token_receives_its_embedding(seed: int) -> None:
    """The exchange, simulated in one process with numbered rows."""
    rng = random.Random(seed)
    ranks, images = rng.randint(1, 5), rng.randint(0, 7)
    rows_of_image = torch.tensor([rng.randint(1, 6) for _ in range(images)], dtype=torch.int64)
    rows = int(rows_of_image.sum())
    tokens = rows + rng.randint(0, 20)
    image_tokens = torch.tensor(sorted(rng.sample(range(tokens), rows)), dtype=torch.int64)
    rank_of_image = torch.tensor([rng.randrange(ranks) for _ in range(images)], dtype=torch.int64)
    rank_of_token = torch.tensor([rng.choice([NO_RANK, *range(ranks)]) for _ in range(tokens)], dtype=torch.int64)
    position_of_token = torch.zeros(tokens, dtype=torch.int64)
    for rank in range(ranks):
        position_of_token[rank_of_token == rank] = torch.arange(int((rank_of_token == rank).sum()))

    tables = [
        build_exchange_table(
            image_tokens, rows_of_image, rank_of_image, rank_of_token, position_of_token, rank=rank, ranks=ranks
        )
        for rank in range(ranks)
    ]
    numbers = torch.arange(rows).split(rows_of_image.tolist())
    sent: list[list[Tensor]] = []  # by sender, by receiver
    for rank, table in enumerate(tables):
        assert table.images.tolist() == [image for image in range(images) if rank_of_image[image] == rank]
        computed = torch.cat([torch.empty(0, dtype=torch.int64), *(numbers[image] for image in table.images.tolist())])
        sent.append(list(computed[table.sent_rows].split(table.sent_counts)))
    for rank, table in enumerate(tables):
        received = [sent[other][rank] for other in range(ranks)]
        assert [len(part) for part in received] == table.received_counts
        own = torch.full((int((rank_of_token == rank).sum()),), -1)
        own[table.received_positions] = torch.cat(received)
        row_of_token = {token: row for row, token in enumerate(image_tokens.tolist())}
        assert own.tolist() == [row_of_token.get(t, -1) for t in range(tokens) if rank_of_token[t] == rank]
