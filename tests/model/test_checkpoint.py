"""Checkpoints that a user brings are loaded, or refused with a reason; folders of checkpoints are kept in order."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, StorageMeta

from model.checkpoint import (
    find_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    mark_latest,
    read_train_state,
    remove_old,
    save_checkpoint,
)
from model.checkpoint_metadata import check_metadata
from model.config import GlmvConfig
from model.errors import CheckpointError
from model.glmv import GlmvModel
from model.parallel import ParallelConfig

ONE_VARIANT = pytest.mark.parametrize("hf_folder", ["glm4v"], indirect=True)


@pytest.fixture
def saved(build: Callable[..., GlmvModel], tmp_path: Path) -> tuple[GlmvModel, Path]:
    """A model, and a checkpoint of it whose manifest lists no file, so that tests can change them."""
    model = build()
    path = tmp_path / "step_0000001"
    save_checkpoint(path, [model], hf_files=lambda folder: None)
    (path / "manifest.json").write_text('{"block_bytes": 1073741824, "files": {}}')
    return model, path


def test_weights_are_loaded_bit_for_bit(saved: tuple[GlmvModel, Path], build: Callable[..., GlmvModel]) -> None:
    model, path = saved
    other = build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    load_checkpoint(find_checkpoint(path), [other])
    expected = model.state_dict()
    for name, value in other.state_dict().items():
        if torch.is_tensor(value):
            assert torch.equal(value, expected[name]), name


@ONE_VARIANT
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named(
    hf_folder: object, build: Callable[..., GlmvModel], tmp_path: Path, value: float
) -> None:
    model = build()
    with torch.no_grad():
        model.adapter.proj.weight[3, 4] = value
    save_checkpoint(tmp_path / "step_0000001", [model], hf_files=lambda folder: None)
    with pytest.raises(
        CheckpointError, match=r"step_0000001 has values that are not finite .* in adapter\.proj\.weight;"
    ):
        load_checkpoint(tmp_path / "step_0000001", [build()])


# --- unsafe and damaged metadata --------------------------------------------------------------------------------------


class Foreign:
    """What an attacker would put into the file that megatron-core unpickles."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@ONE_VARIANT
def test_foreign_class_in_metadata_is_refused_before_it_runs(
    hf_folder: object, saved: tuple[GlmvModel, Path], tmp_path: Path
) -> None:
    model, path = saved
    marker = tmp_path / "ran"
    with (path / "state" / ".metadata").open("wb") as stream:
        pickle.dump(Foreign(marker), stream)
    with pytest.raises(CheckpointError, match=r"names posix.system.*Do not use this checkpoint"):
        load_checkpoint(path, [model])
    assert not marker.exists()


HOSTILE_NAMES = [
    ("torch.distributed.checkpoint.metadata", "os.system"),  # a dotted name leads out of its module
    ("torch.distributed.checkpoint.planner", "operator.attrgetter"),
    ("torch.distributed.checkpoint.planner", "io"),  # something that the module has imported
    ("torch", "hub.load"),
    ("builtins", "eval"),
]


@pytest.mark.parametrize(("module", "name"), HOSTILE_NAMES)
def test_names_outside_the_allowed_classes_are_refused(tmp_path: Path, module: str, name: str) -> None:
    """The pickle is written by hand: PROTO 4, two strings, STACK_GLOBAL, STOP."""
    strings = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    (tmp_path / ".metadata").write_bytes(b"\x80\x04" + strings + b"\x93.")
    with pytest.raises(CheckpointError, match=rf"names {module}.{name}, which no checkpoint needs"):
        check_metadata(tmp_path)


def test_metadata_of_another_type_is_damaged(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps({}))
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged"):
        check_metadata(tmp_path)


@ONE_VARIANT
def test_object_in_place_of_a_tensor_is_refused_before_it_is_read(
    hf_folder: object, saved: tuple[GlmvModel, Path]
) -> None:
    """A full unpickler of torch would read what the metadata calls bytes."""
    model, path = saved
    file = path / "state" / ".metadata"
    metadata = FileSystemReader(file.parent).read_metadata()
    metadata.state_dict_metadata["adapter.proj.weight"] = BytesStorageMetadata()
    file.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"holds pickled objects \(adapter.proj.weight\); they were not read"):
        load_checkpoint(path, [model])


@ONE_VARIANT
def test_code_where_megatron_core_keeps_its_common_state_does_not_run(
    hf_folder: object, saved: tuple[GlmvModel, Path], tmp_path: Path
) -> None:
    """From 0.19 on it is an object among the tensors. torch reads that with a full unpickler, as is shown last."""
    model, path = saved
    (path / "state" / "common.pt").unlink()
    marker, key = tmp_path / "ran", "common_state/shard_0_1"
    torch_checkpoint.save({key: Foreign(marker)}, storage_writer=FileSystemWriter(path / "state"), no_dist=True)
    file = path / "state" / ".metadata"
    file.write_bytes(pickle.dumps(replace(FileSystemReader(file.parent).read_metadata(), storage_meta=StorageMeta())))
    with pytest.raises(CheckpointError, match=rf"holds pickled objects \({key}\); they were not read"):
        load_checkpoint(path, [model])
    assert not marker.exists()
    torch_checkpoint.load({key: BytesIO()}, storage_reader=FileSystemReader(path / "state"), no_dist=True)
    assert marker.exists()


@ONE_VARIANT
def test_code_in_the_file_of_hyperparameters_does_not_run(
    hf_folder: object, saved: tuple[GlmvModel, Path], tmp_path: Path
) -> None:
    model, path = saved
    marker = tmp_path / "ran"
    torch.save(Foreign(marker), path / "state" / "common.pt")
    with pytest.raises(CheckpointError, match=r"does not load into this model: Weights only load failed"):
        load_checkpoint(path, [model])
    assert not marker.exists()


@ONE_VARIANT
def test_missing_or_damaged_metadata_is_named(hf_folder: object, saved: tuple[GlmvModel, Path], tmp_path: Path) -> None:
    model, path = saved
    metadata = path / "state" / ".metadata"
    complete = metadata.read_bytes()
    metadata.write_bytes(complete[: len(complete) // 2])
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged.*use another step"):
        load_checkpoint(path, [model])
    metadata.unlink()
    with pytest.raises(CheckpointError, match=r"is incomplete: .*\.metadata is missing"):
        load_checkpoint(path, [model])
    with pytest.raises(CheckpointError, match=r"holds only weights.*model.init_from"):
        read_train_state(path)
    with pytest.raises(CheckpointError, match=r"is no checkpoint"):
        find_checkpoint(tmp_path / "elsewhere")


@ONE_VARIANT
def test_checkpoint_of_another_model_is_refused(
    hf_folder: object, saved: tuple[GlmvModel, Path], single_process: None
) -> None:
    other = GlmvModel(GlmvConfig.from_preset("tiny_moe"), ParallelConfig())
    with pytest.raises(CheckpointError, match=r"does not load into this model"):
        load_checkpoint(saved[1], [other])


# --- the folder of checkpoints ----------------------------------------------------------------------------------------


def make_steps(run: Path, *numbers: int) -> list[Path]:
    folders = [run / "checkpoints" / f"step_{number:07d}" for number in numbers]
    for folder in folders:
        folder.mkdir(parents=True)
    return folders


@pytest.mark.fast
def test_old_steps_are_removed(tmp_path: Path) -> None:
    folders = make_steps(tmp_path, 100, 200, 300, 400)
    remove_old(folders[3], keep_last=2)
    assert [folder.exists() for folder in folders] == [False, False, True, True]


@pytest.mark.fast
def test_multiples_of_keep_every_are_never_removed(tmp_path: Path) -> None:
    folders = make_steps(tmp_path, 100, 200, 300, 400, 500)
    remove_old(folders[4], keep_last=1, keep_every=200)
    assert [folder.exists() for folder in folders] == [False, True, False, True, True]
    remove_old(folders[4], keep_last=1)
    assert [folder.exists() for folder in folders] == [False, False, False, False, True]
    assert not list(folders[0].parent.glob(".*"))


@pytest.mark.fast
def test_keep_every_counts_steps_beyond_seven_digits(tmp_path: Path) -> None:
    folders = make_steps(tmp_path, 9_999_000, 10_000_000, 10_001_000)
    remove_old(folders[2], keep_last=1, keep_every=10_000_000)
    assert [folder.exists() for folder in folders] == [False, True, True]


@pytest.mark.fast
def test_run_that_was_set_back_removes_no_later_step_with_keep_every(tmp_path: Path) -> None:
    folders = make_steps(tmp_path, 300, 500, 600, 900, 1000)
    copy = folders[0].with_name("step_0000300_best")
    copy.mkdir()
    mark_latest(folders[2])
    remove_old(folders[2], keep_last=1, keep_every=500)
    assert [folder.exists() for folder in (*folders, copy)] == [False, True, True, True, True, True]


@pytest.mark.fast
def test_copy_of_a_step_folder_is_neither_removed_nor_counted(tmp_path: Path) -> None:
    folders = make_steps(tmp_path, 100, 200)
    copies = [folder.with_name(f"{folder.name}_best") for folder in folders]
    for copy in copies:
        copy.mkdir()
    remove_old(folders[1], keep_last=2)
    assert all(folder.exists() for folder in (*folders, *copies))
    remove_old(folders[1], keep_last=1)
    assert [folder.exists() for folder in (*folders, *copies)] == [False, True, True, True]


@pytest.mark.fast
def test_run_that_was_set_back_keeps_the_step_that_it_just_saved(tmp_path: Path) -> None:
    """The user wrote 500 into `latest`; 600 is saved while 900 and 1000 still exist."""
    folders = make_steps(tmp_path, 500, 600, 900, 1000)
    mark_latest(folders[1])
    remove_old(folders[1], keep_last=1)
    assert latest_checkpoint(tmp_path) == folders[1]
    assert [folder.exists() for folder in folders] == [False, True, True, True]


@pytest.mark.fast
@pytest.mark.parametrize("content", ["", "step_", "../elsewhere", "step_0000300"])
def test_latest_file_with_a_wrong_name_is_refused(tmp_path: Path, content: str) -> None:
    make_steps(tmp_path, 100)
    (tmp_path / "checkpoints" / "latest").write_text(content)
    with pytest.raises(CheckpointError, match=r"latest names .*, which does not exist; write the name of an existing"):
        latest_checkpoint(tmp_path)


@pytest.mark.fast
@pytest.mark.parametrize(
    "content",
    ['{"step": 3', '{"step": 3, "moons": 2}', "[]", "3", "\xff", '{"step": "5"}', '{"step": 5, "config": []}'],
)
def test_damaged_train_state_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "train_state.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"train_state.json is damaged .*; use another step"):
        read_train_state(tmp_path)
