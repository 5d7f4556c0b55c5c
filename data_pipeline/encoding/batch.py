"""`Batch`: one pack of samples as named tensors, all that the training loop sees of the data.

A pack of 16 tokens with segment_multiple 4 and two samples, `p q r s t` (loss on s, t) and `x y z` (loss on y, z):

    input_ids        p q r s  t _ _ _  x y z _  _ _ _ _        _ is the padding token
    labels           q r s t  _ _ _ _  y z _ _  _ _ _ _        the next token of the same sample
    loss_mask        0 0 1 1  0 0 0 0  1 1 0 0  0 0 0 0        1 where the label carries loss
    position_ids     0 1 2 3  4 0 0 0  0 1 2 0  0 0 0 0        (text only: the same on all 3 axes)
    cu_seqlens       0 8 12 16                                 segments with their padding; the tail is a segment too
    segment_lengths  5 3 0                                     useful tokens
    segment_domains  text text ""
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from data_pipeline.media.pixel_budget import SLICE_BYTES


@dataclass
class EncodedSample:
    """One sample, ready to be packed."""

    sample_id: str  # "shard.tar/KEY"
    domain: str
    input_ids: np.ndarray  # int64 [tokens]
    loss: np.ndarray  # bool [tokens], True where this token itself is to be predicted
    position_ids: np.ndarray  # int64 [3, tokens]: time, height, width
    patches: torch.Tensor  # uint8 [slices, 588]
    grids: tuple[tuple[int, int], ...] = ()  # (h, w) in patches of each image or frame pair
    frames_per_image: tuple[int, ...] = ()  # 1 for a still image, 2 for a frame pair

    def __len__(self) -> int:
        return len(self.input_ids)

    @classmethod
    def empty(cls) -> EncodedSample:
        """Return a sample without tokens: its place in the pack stays padding."""
        none = np.zeros(0, dtype=np.int64)
        return cls("", "", none, none.astype(bool), none.reshape(3, 0), torch.empty(0, SLICE_BYTES, dtype=torch.uint8))


@dataclass
class Batch:
    """One pack of exactly seq_length tokens (micro_batch_size is 1). The module's docstring has an example."""

    input_ids: torch.Tensor  # int64 [tokens]
    labels: torch.Tensor  # int64 [tokens]
    loss_mask: torch.Tensor  # float32 [tokens]
    position_ids: torch.Tensor  # int64 [3, tokens]: time, height, width; from 0 in every segment
    cu_seqlens: torch.Tensor  # int32 [segments + 1]
    segment_lengths: torch.Tensor  # int32 [segments]
    segment_domains: list[str]
    patches: torch.Tensor  # uint8 [slices, 588]: (y, x, channel); a frame pair's patch is two neighbouring slices
    grid_thw: torch.Tensor  # int64 [images, 3]: one row per still image or frame pair, t = 1, h and w in patches
    frames_per_image: torch.Tensor  # int32 [images]: 1 for a still image, 2 for a frame pair
    sample_ids: list[str]  # "shard.tar/KEY" of each segment; "" for the tail and for segments of padding alone
    segment_sources: list[str] = field(default_factory=list)  # label of the source of each segment; "" for the tail
    quarantined: list[dict[str, Any]] = field(default_factory=list)  # errors.UnusedSample.as_json() of each
    # uint8 [tokens, layers with experts, experts per token]: what routers are to choose; None: they choose themselves
    routed_experts: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Useful tokens: padding is not counted."""
        return int(self.segment_lengths.sum())

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that carry loss."""
        return int(self.loss_mask.sum())

    @property
    def num_samples(self) -> int:
        """Segments that are not padding alone."""
        return sum(bool(sample_id) for sample_id in self.sample_ids)

    @property
    def num_images(self) -> int:
        """Still images and frame pairs."""
        return len(self.grid_thw)

    @property
    def num_patches(self) -> int:
        """Patches of all still images and frame pairs."""
        return int(self.grid_thw.prod(dim=1).sum())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, torch.Tensor))

    def with_tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """Return a copy of the pack with `change` applied to every tensor."""
        tensors: Any = {name: change(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **tensors)

    def pin_memory(self) -> Batch:
        """Return the pack in pinned memory, from which a GPU copies by itself. Called by the DataLoader."""
        return self.with_tensors(torch.Tensor.pin_memory)


def collate(
    samples: Sequence[EncodedSample],
    *,
    seq_length: int,
    segment_multiple: int,
    pad_id: int,
    segment_sizes: Sequence[int] | None = None,
    segment_sources: Sequence[str] | None = None,
    quarantined: Sequence[dict[str, Any]] = (),
) -> Batch:
    """Lay samples one after the other, each padded to a multiple of segment_multiple.

    Args:
        samples: They must fit seq_length.
        seq_length: Tokens of the pack.
        segment_multiple: Tokens.
        pad_id: The padding token.
        segment_sizes: Tokens reserved for each of `samples`, multiples of segment_multiple. For packs in which some
            samples are shorter than was planned; by default the padded lengths of the samples.
        segment_sources: Label of the source of each of `samples`; by default "".
        quarantined: What `Batch.quarantined` will hold.
    """
    if segment_sizes is None:
        segment_sizes = [padded_length(len(sample), segment_multiple) for sample in samples]
    input_ids = np.full(seq_length, pad_id, dtype=np.int64)
    labels = np.full(seq_length, pad_id, dtype=np.int64)
    loss_mask = np.zeros(seq_length, dtype=np.float32)
    position_ids = np.zeros((3, seq_length), dtype=np.int64)
    boundaries = [0]
    for sample, size in zip(samples, segment_sizes, strict=True):
        start, end = boundaries[-1], boundaries[-1] + len(sample)
        input_ids[start:end] = sample.input_ids
        labels[start : max(end - 1, start)] = sample.input_ids[1:]
        loss_mask[start : max(end - 1, start)] = sample.loss[1:]
        position_ids[:, start:end] = sample.position_ids
        boundaries.append(start + size)
    tail = int(boundaries[-1] < seq_length)
    grids = [(1, *grid) for sample in samples for grid in sample.grids]
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        loss_mask=torch.from_numpy(loss_mask),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=torch.tensor(boundaries + [seq_length] * tail, dtype=torch.int32),
        segment_lengths=torch.tensor([len(sample) for sample in samples] + [0] * tail, dtype=torch.int32),
        segment_domains=[sample.domain for sample in samples] + [""] * tail,
        patches=torch.cat([torch.empty(0, SLICE_BYTES, dtype=torch.uint8), *(sample.patches for sample in samples)]),
        grid_thw=torch.tensor(grids, dtype=torch.int64).reshape(-1, 3),
        frames_per_image=torch.tensor(
            [count for sample in samples for count in sample.frames_per_image], dtype=torch.int32
        ),
        sample_ids=[sample.sample_id for sample in samples] + [""] * tail,
        segment_sources=[*(segment_sources or [""] * len(samples)), *[""] * tail],
        quarantined=list(quarantined),
    )


def padded_length(length: int, multiple: int) -> int:
    """Return the length rounded up to a multiple."""
    return -(-length // multiple) * multiple
