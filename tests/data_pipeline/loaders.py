"""A loader for tests, and digests of its packs."""

from __future__ import annotations

import hashlib
import json

import torch

from data_pipeline.config import DataConfig
from data_pipeline.encoding.batch import Batch
from data_pipeline.loading.loader import PackedLoader
from data_pipeline.plan.pack_cost import PackCost

SEQ_LENGTH = 512
opened: list[PackedLoader] = []  # by the present test, which need not close them


def loader(
    config: DataConfig,
    *,
    batch: int = 4,
    rank: int = 0,
    ranks: int = 1,
    seq_length: int = SEQ_LENGTH,
    small_steps: int = 0,
) -> PackedLoader:
    made = PackedLoader(
        config,
        seq_length=seq_length,
        global_batch_size=batch,
        cost=PackCost(token=1000, token_squared=1, patch=100, patch_squared=1),
        data_parallel_rank=rank,
        data_parallel_size=ranks,
        small_steps=small_steps,
    )
    opened.append(made)
    return made


def digest(batch: Batch) -> tuple[list[str], str]:
    """Return the sample ids, and a checksum of every byte of the pack."""
    content = hashlib.sha256(json.dumps([batch.segment_domains, batch.quarantined]).encode())
    for name, value in sorted(vars(batch).items()):
        if isinstance(value, torch.Tensor):
            content.update(name.encode() + str(value.shape).encode() + value.numpy().tobytes())
    return batch.sample_ids, content.hexdigest()


def stream(config: DataConfig, steps: int, state: dict | None = None, **options) -> list[list[tuple[list[str], str]]]:
    """Return the digests of the packs of some steps, from the start or from a state."""
    packed = loader(config, **options)
    if state is not None:
        packed.load_state_dict(json.loads(json.dumps(state)))
    taken = [[digest(batch) for batch in packed.next_step()] for _ in range(steps)]
    packed.close()
    return taken


def take(packed: PackedLoader, steps: int) -> list[Batch]:
    """Return the packs of the next steps."""
    return [batch for _ in range(steps) for batch in packed.next_step()]
