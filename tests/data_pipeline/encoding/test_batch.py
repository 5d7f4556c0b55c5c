"""Collation: the worked example of data_pipeline/encoding/batch.py, and the separation of samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.encoding.batch import EncodedSample, collate
from data_pipeline.encoding.rope_positions import rope_positions

pytestmark = pytest.mark.fast

P, Q, R, S, T, X, Y, Z, PAD = 11, 12, 13, 14, 15, 21, 22, 23, 0


def encoded(ids: list[int], loss: list[int], grids=(), frames_per_image=(), domain: str = "text", image_id: int = 99):
    input_ids = np.array(ids, dtype=np.int64)
    slices = sum(grid[0] * grid[1] * count for grid, count in zip(grids, frames_per_image, strict=True))
    return EncodedSample(
        sample_id=f"a.tar/{ids[0]}",
        domain=domain,
        input_ids=input_ids,
        loss=np.array(loss, dtype=bool),
        position_ids=rope_positions(input_ids == image_id, grids),
        patches=torch.full((slices, 588), ids[0], dtype=torch.uint8),
        grids=grids,
        frames_per_image=frames_per_image,
    )


def test_worked_example():
    samples = [encoded([P, Q, R, S, T], [0, 0, 0, 1, 1]), encoded([X, Y, Z], [0, 1, 1])]
    batch = collate(samples, seq_length=16, segment_multiple=4, pad_id=PAD)
    assert batch.input_ids.tolist() == [P, Q, R, S, T, 0, 0, 0, X, Y, Z, 0, 0, 0, 0, 0]
    assert batch.labels.tolist() == [Q, R, S, T, 0, 0, 0, 0, Y, Z, 0, 0, 0, 0, 0, 0]
    assert batch.loss_mask.tolist() == [0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0]] * 3
    assert batch.cu_seqlens.tolist() == [0, 8, 12, 16]
    assert batch.segment_lengths.tolist() == [5, 3, 0]
    assert batch.segment_domains == ["text", "text", ""]
    assert batch.sample_ids == ["a.tar/11", "a.tar/21", ""]
    assert (batch.num_tokens, batch.num_loss_tokens, batch.num_samples) == (8, 4, 2)
    assert (batch.patches.shape, batch.grid_thw.shape, batch.frames_per_image.shape) == ((0, 588), (0, 3), (0,))
    assert (batch.num_images, batch.num_patches) == (0, 0)


def test_tensors_have_the_documented_types():
    batch = collate([encoded([P, Q], [0, 1])], seq_length=8, segment_multiple=8, pad_id=PAD)
    kinds = {name: value.dtype for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    assert kinds == {
        **dict.fromkeys(("input_ids", "labels", "position_ids", "grid_thw"), torch.int64),
        **dict.fromkeys(("cu_seqlens", "segment_lengths", "frames_per_image"), torch.int32),
        "loss_mask": torch.float32,
        "patches": torch.uint8,
    }


def test_full_pack_has_no_tail_segment():
    batch = collate([encoded([P, Q, R, S], [0, 1, 1, 1]), encoded([X, Y, Z], [0, 1, 1])], **options(8))
    assert batch.cu_seqlens.tolist() == [0, 4, 8]
    assert batch.segment_lengths.tolist() == [4, 3]
    assert len(batch.sample_ids) == 2


def test_pack_without_samples_is_one_tail_segment():
    quarantined = [{"reason": "checksum", "shard": "a.tar", "key": "1", "detail": ""}]
    batch = collate([], quarantined=quarantined, **options(8))
    assert batch.cu_seqlens.tolist() == [0, 8]
    assert (batch.num_tokens, batch.num_loss_tokens, batch.num_samples) == (0, 0, 0)
    assert batch.quarantined == quarantined


def test_images_and_frame_pairs_keep_the_order_of_samples():
    image = encoded([P, 99, Q], [0, 0, 1], grids=((2, 2),), frames_per_image=(1,))
    video = encoded([X, 99, 99, Y, 99, 99, Z], [0, 0, 0, 1, 0, 0, 1], grids=((2, 4), (2, 4)), frames_per_image=(2, 2))
    batch = collate([video, image], **options(16))
    assert batch.grid_thw.tolist() == [[1, 2, 4], [1, 2, 4], [1, 2, 2]]
    assert batch.frames_per_image.tolist() == [2, 2, 1]
    assert (batch.num_images, batch.num_patches) == (3, 20)
    assert batch.patches[:, 0].tolist() == [X] * 32 + [P] * 4
    assert batch.position_ids[2, :7].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert batch.position_ids[2, 8:11].tolist() == [0, 1, 2]


def options(seq_length: int) -> dict[str, Any]:
    return {"seq_length": seq_length, "segment_multiple": 4, "pad_id": PAD}


def test_segment_sizes_keep_the_positions_of_later_samples():
    """8 tokens are reserved for a sample of 3, and 4 for an empty one."""
    samples = [encoded([X, Y, Z], [0, 1, 1]), EncodedSample.empty(), encoded([P, Q], [0, 1])]
    batch = collate(samples, seq_length=16, segment_multiple=4, pad_id=PAD, segment_sizes=[8, 4, 4])
    assert batch.input_ids.tolist() == [X, Y, Z, 0, 0, 0, 0, 0, 0, 0, 0, 0, P, Q, 0, 0]
    assert batch.labels.tolist() == [Y, Z, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, Q, 0, 0, 0]
    assert batch.loss_mask.tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]
    assert batch.cu_seqlens.tolist() == [0, 8, 12, 16]
    assert batch.segment_lengths.tolist() == [3, 0, 2]
    assert batch.segment_domains == ["text", "", "text"]
    assert batch.sample_ids == ["a.tar/21", "", "a.tar/11"]
    assert batch.num_samples == 2
    first = collate([EncodedSample.empty()], seq_length=8, segment_multiple=4, pad_id=PAD, segment_sizes=[8])
    assert first.segment_lengths.tolist() == [0]
    assert not first.loss_mask.any()
