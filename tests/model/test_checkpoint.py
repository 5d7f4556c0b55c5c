"""What a checkpoint that a user brings may do: be read, or be refused with a reason. Nothing else."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from model.checkpoint import CheckpointError, find_checkpoint, load_checkpoint, read_train_state, save_checkpoint
from model.glmv import GlmvModel


@pytest.fixture
def saved(build: Callable[..., GlmvModel], tmp_path: Path) -> tuple[GlmvModel, Path]:
    model = build()
    path = tmp_path / "step_0000001"
    save_checkpoint(path, model, companions=lambda folder: None)
    return model, path


def test_weights_come_back_bit_for_bit(saved: tuple[GlmvModel, Path], build: Callable[..., GlmvModel]) -> None:
    model, path = saved
    other = build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    load_checkpoint(find_checkpoint(path), other)
    expected = model.state_dict()
    for name, value in other.state_dict().items():
        if torch.is_tensor(value):
            assert torch.equal(value, expected[name]), name


class Foreign:
    """What an attacker would put into the file that megatron-core unpickles."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("hf_folder", ["glm4v"], indirect=True)
def test_a_foreign_class_in_the_metadata_is_refused_unread(
    hf_folder: object, saved: tuple[GlmvModel, Path], tmp_path: Path
) -> None:
    model, path = saved
    marker = tmp_path / "ran"
    with (path / "state" / ".metadata").open("wb") as stream:
        pickle.dump(Foreign(marker), stream)
    with pytest.raises(CheckpointError, match=r"names the class posix.system.*Do not use this checkpoint"):
        load_checkpoint(path, model)
    assert not marker.exists()


@pytest.mark.parametrize("hf_folder", ["glm4v"], indirect=True)
def test_an_object_in_place_of_a_tensor_is_refused_unread(hf_folder: object, saved: tuple[GlmvModel, Path]) -> None:
    """torch reads what the metadata calls bytes with a full unpickler."""
    model, path = saved
    file = path / "state" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    metadata.state_dict_metadata["adapter.proj.weight"] = BytesStorageMetadata()
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"holds pickled objects \(adapter.proj.weight\); they were not read"):
        load_checkpoint(path, model)


@pytest.mark.parametrize("hf_folder", ["glm4v"], indirect=True)
def test_what_is_missing_or_damaged_is_named(hf_folder: object, saved: tuple[GlmvModel, Path], tmp_path: Path) -> None:
    model, path = saved
    metadata = path / "state" / ".metadata"
    whole = metadata.read_bytes()
    metadata.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged.*use another step"):
        load_checkpoint(path, model)
    metadata.unlink()
    with pytest.raises(CheckpointError, match=r"is incomplete: .*\.metadata is missing"):
        load_checkpoint(path, model)
    with pytest.raises(CheckpointError, match=r"holds weights alone.*model.init_from"):
        read_train_state(path)
    with pytest.raises(CheckpointError, match=r"is no checkpoint"):
        find_checkpoint(tmp_path / "elsewhere")


@pytest.mark.parametrize("hf_folder", ["glm4v"], indirect=True)
def test_another_model_is_refused(hf_folder: object, saved: tuple[GlmvModel, Path], single_process: None) -> None:
    from model.config import GlmvConfig
    from model.parallel import ParallelConfig

    other = GlmvModel(GlmvConfig.from_preset("tiny_moe"), ParallelConfig())
    with pytest.raises(CheckpointError, match=r"does not load into this model"):
        load_checkpoint(saved[1], other)
