"""3-D rope positions of one sample, equal to transformers' `Glm4vMoeModel.get_rope_index`.

Text counts up on all three axes together. An image starts where the text before it stopped: each of its tokens has that
position in time, its row and column are added on the other two axes, and the text after it continues past the longer of
its sides. Every frame pair of a video is an image. For `ab[2x3 tokens]c`:

    time   0 1  2 2 2 2 2 2  5
    height 0 1  2 2 2 3 3 3  5
    width  0 1  2 3 4 2 3 4  5
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.media.pixel_budget import MERGE_SIZE


def rope_positions(is_image: np.ndarray, grids: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return the positions of one sample's tokens.

    Args:
        is_image: bool [tokens], True at <|image|> tokens.
        grids: (h, w) in patches of each run of <|image|> tokens, in order.

    Returns:
        int64 [3 (time, height, width), tokens].

    Raises:
        DataError: Runs and grids do not agree.
    """
    edges = np.flatnonzero(np.diff(is_image.astype(np.int8), prepend=0, append=0))
    starts, ends = edges[0::2].tolist(), edges[1::2].tolist()
    if len(starts) != len(grids):
        raise DataError(f"{len(starts)} runs of <|image|> tokens but {len(grids)} images")

    positions = np.empty((3, len(is_image)), dtype=np.int64)
    done, position = 0, 0
    for start, end, grid in zip(starts, ends, grids, strict=True):
        rows, columns = grid[0] // MERGE_SIZE, grid[1] // MERGE_SIZE
        if end - start != rows * columns:
            raise DataError(f"{end - start} <|image|> tokens stand for an image of {rows}x{columns} tokens")
        positions[:, done:start] = np.arange(position, position + start - done)
        position += start - done
        positions[0, start:end] = position
        positions[1, start:end] = position + np.repeat(np.arange(rows), columns)
        positions[2, start:end] = position + np.tile(np.arange(columns), rows)
        position += max(rows, columns)
        done = end
    positions[:, done:] = np.arange(position, position + len(is_image) - done)
    return positions
