"""A streamed checkpoint has the keys, shapes and dtypes that megatron-core asks for, at full size too."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from torch._subclasses.fake_tensor import FakeTensorMode

from model.checkpoint_state import sharded_state
from model.config import GlmvConfig
from model.glmv import GlmvModel
from model.parallel import ParallelConfig
from model.weights.random_weights import RandomWeights
from streaming.checkpoint_job import CheckpointJob

PRESETS = ("tiny_moe", "tiny_dense", "glm45v", "glm41v_9b")


@pytest.mark.parametrize("preset", PRESETS)
def test_keys_and_shapes_are_those_of_megatron(
    preset: str, single_process: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # The tracker of random states compares states, which is not possible with fake tensors.
    monkeypatch.setattr(CudaRNGStatesTracker, "fork", lambda self, *_: contextlib.nullcontext())
    config = GlmvConfig.from_preset(preset)
    with FakeTensorMode():
        state: Any = sharded_state([GlmvModel(config, ParallelConfig(), dtype=torch.bfloat16)], None)
        apply_factories(state)
    expected = {
        shard.key: (tuple(shard.global_shape), shard.dtype)
        for shard in nested_values(state)
        if isinstance(shard, ShardedTensor)
    }
    job = CheckpointJob(
        RandomWeights(config, 0),
        config,
        dtype=torch.bfloat16,
        block_bytes=2**24,
        checksum="xxh3",
        identity={},
        hf_files=lambda folder: None,
    )
    stored: Any = job.metadata([]).state_dict_metadata
    assert {key: (tuple(one.size), one.properties.dtype) for key, one in stored.items()} == expected
    assert sum(portion.nbytes for portion in job.portions) == job_bytes(config)
    names = [name for portion in job.portions for name in portion.names]
    assert len(set(names)) == len(names)
    assert json.dumps(job.identity)


def job_bytes(config: GlmvConfig) -> int:
    source = RandomWeights(config, 0)
    return sum(
        torch.Size(source.shape(name)).numel() * (4 if name.endswith("e_score_correction_bias") else 2)
        for name in source.names()
    )
