"""Files of a checkpoint: damage is named when it is loaded, and a failed save leaves nothing behind."""

from __future__ import annotations

import json
import logging
import pickle
import resource
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import xxhash
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import StorageMeta

from common import storage
from common.files import write_json
from common.storage import StorageError
from model import checkpoint_manifest
from model.checkpoint import TrainState, load_checkpoint, read_train_state, save_checkpoint
from model.config import ConfigError
from model.errors import CheckpointError
from model.glmv import GlmvModel

pytestmark = pytest.mark.parametrize("hf_folder", ["glm4v"], indirect=True)


def write_config(folder: Path) -> None:
    write_json(folder / "config.json", {"model_type": "glm4v", "text_config": {}})


@pytest.fixture
def model(build: Callable[..., GlmvModel]) -> GlmvModel:
    return build()


@pytest.fixture
def checkpoint(model: GlmvModel, tmp_path: Path) -> Path:
    path = tmp_path / "step_0000001"
    save_checkpoint(path, [model], hf_files=write_config, train_state=TrainState(step=1))
    return path


# --- the manifest -----------------------------------------------------------------------------------------------------


def test_manifest_has_the_checksums_of_xxhash(hf_folder: Any, checkpoint: Path) -> None:
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    present = {p.relative_to(checkpoint).as_posix(): p.read_bytes() for p in checkpoint.rglob("*") if p.is_file()}
    del present["manifest.json"]
    assert {"state/.metadata", "state/common.pt", "train_state.json", "hf/config.json"} < set(present)
    assert files == {
        name: {"bytes": len(content), "xxh3_64": [xxhash.xxh3_64(content).hexdigest()]}
        for name, content in present.items()
    }


def test_large_file_has_a_checksum_per_block(
    hf_folder: Any, model: GlmvModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_manifest, "BLOCK_BYTES", 100_000)
    path = tmp_path / "step_0000001"
    save_checkpoint(path, [model], hf_files=write_config)
    content = (path / "state" / "__0_0.distcp").read_bytes()
    blocks = [content[begin : begin + 100_000] for begin in range(0, len(content), 100_000)]
    entry = json.loads((path / "manifest.json").read_text())["files"]["state/__0_0.distcp"]
    assert entry == {"bytes": len(content), "xxh3_64": [xxhash.xxh3_64(block).hexdigest() for block in blocks]}
    load_checkpoint(path, [model])
    damage(path / "state" / "__0_0.distcp", at=250_000)
    with pytest.raises(CheckpointError, match=r"__0_0.distcp is damaged: .*\(checksum of block 2\)"):
        load_checkpoint(path, [model])


def damage(file: Path, at: int = -500) -> None:
    """Write 64 other bytes into the middle of a file, which keeps its size."""
    content = bytearray(file.read_bytes())
    at = at % len(content)
    content[at : at + 64] = bytes(byte ^ 0x5A for byte in content[at : at + 64])
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


NAMES = ["state/__0_0.distcp", "state/__0_1.distcp", "state/common.pt", "state/metadata.json", "hf/config.json"]
KINDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "other content": (lambda file: damage(file, at=0), "is damaged: its content is not what was saved"),
    "truncated": (truncate, "is damaged: it has .* bytes and was saved with"),
    "missing": (Path.unlink, "is missing; use another step"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_file_is_named(hf_folder: Any, checkpoint: Path, model: GlmvModel, kind: str, name: str) -> None:
    change, message = KINDS[kind]
    change(checkpoint / name)
    with pytest.raises(CheckpointError, match=f"{name} {message}"):
        load_checkpoint(checkpoint, [model])


def test_sizes_alone_are_compared_on_request(hf_folder: Any, checkpoint: Path, model: GlmvModel) -> None:
    damage(checkpoint / "train_state.json", at=0)
    load_checkpoint(checkpoint, [model], verify="sizes")
    truncate(checkpoint / "train_state.json")
    with pytest.raises(CheckpointError, match=r"train_state.json is damaged"):
        load_checkpoint(checkpoint, [model], verify="sizes")
    with pytest.raises(ConfigError, match=r"checkpoint.verify='none': choose full or sizes"):
        load_checkpoint(checkpoint, [model], verify="none")


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"files": {"a": 1}}', '{"block_bytes": 5, "files": {}}', "\xff"])
def test_damaged_manifest_is_named(hf_folder: Any, checkpoint: Path, model: GlmvModel, content: str) -> None:
    (checkpoint / "manifest.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"manifest.json is damaged; use another step"):
        load_checkpoint(checkpoint, [model])


def test_checkpoint_that_has_lost_its_manifest_is_refused(hf_folder: Any, checkpoint: Path, model: GlmvModel) -> None:
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=rf"{checkpoint}/manifest.json is missing.*copy the checkpoint again"):
        load_checkpoint(checkpoint, [model])


def test_checkpoint_of_an_earlier_version_loads_with_a_warning(
    hf_folder: Any, checkpoint: Path, model: GlmvModel, caplog: pytest.LogCaptureFixture
) -> None:
    """Torch's own writer, which earlier versions used, names each save; they wrote no manifest."""
    (checkpoint / "manifest.json").unlink()
    metadata = FileSystemReader(checkpoint / "state").read_metadata()
    metadata.storage_meta = StorageMeta(checkpoint_id=str(checkpoint), save_id="0b6e")
    (checkpoint / "state" / ".metadata").write_bytes(pickle.dumps(metadata))
    with caplog.at_level(logging.WARNING):
        load_checkpoint(checkpoint, [model])
    assert f"{checkpoint} has no manifest.json" in caplog.text


# --- storage that fails -----------------------------------------------------------------------------------------------

FAILING = Path("/proc/self/mem")  # reading it at its begin is an input/output error


def make_fail(file: Path) -> None:
    file.unlink()
    file.symlink_to(FAILING)


@pytest.mark.parametrize("name", ["manifest.json", "state/.metadata", "train_state.json"])
def test_failing_storage_is_not_damage(
    hf_folder: Any, checkpoint: Path, model: GlmvModel, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(storage, "DELAYS", (0.1, 0.1))
    if name == "train_state.json":  # its size would differ
        list_no_file(checkpoint)
    make_fail(checkpoint / name)
    message = rf"{checkpoint}/{name} cannot be read \(Input/output error\), in 3 attempts"
    with pytest.raises(StorageError, match=message):
        read_train_state(checkpoint) if name == "train_state.json" else load_checkpoint(checkpoint, [model])


def list_no_file(checkpoint: Path) -> None:
    write_json(checkpoint / "manifest.json", {"block_bytes": checkpoint_manifest.BLOCK_BYTES, "files": {}})


def test_storage_that_fails_for_a_moment_is_waited_for(hf_folder: Any, checkpoint: Path, model: GlmvModel) -> None:
    manifest, kept = checkpoint / "manifest.json", checkpoint.parent / "kept"
    shutil.copy(manifest, kept)
    make_fail(manifest)
    timer = threading.Timer(0.2, lambda: kept.replace(manifest))
    timer.start()
    load_checkpoint(checkpoint, [model])
    timer.join()


# --- saves that fail --------------------------------------------------------------------------------------------------

TMPFS = "mount", "-t", "tmpfs", "-o"


def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as probe:
        mounted = subprocess.run([*TMPFS, "size=64k", "tmpfs", probe], capture_output=True).returncode == 0
        if mounted:
            subprocess.run(["umount", probe], check=True)
    return mounted


@contextmanager
def full_file_system(folder: Path, size: int) -> Iterator[None]:
    """Mount a file system of `size` bytes at `folder`."""
    subprocess.run([*TMPFS, f"size={size}", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@contextmanager
def file_size_limit(folder: Path, size: int) -> Iterator[None]:
    """Let this process and its children write no file above `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


Limit = Callable[[Path, int], AbstractContextManager[None]]
LIMITS: list[tuple[Limit, float]] = [(file_size_limit, share) for share in (0.0, 0.001, 0.9)]
if can_mount():  # only root may
    LIMITS += [(full_file_system, share) for share in (0.001, 0.01, 0.5, 0.99, 0.999)]


@pytest.mark.parametrize(("limit", "share"), LIMITS)
def test_failed_save_is_one_line_and_leaves_nothing(
    hf_folder: tuple[Path, nn.Module],
    model: GlmvModel,
    checkpoint: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    limit: Limit,
    share: float,
) -> None:
    """The limit is a share of what the checkpoint needs, so that different files are the first that fail."""
    sizes = [file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()]
    needed = sum(sizes) if limit is full_file_system else max(sizes)
    runs = tmp_path / "run"
    runs.mkdir()
    with limit(runs, max(1, int(share * needed))):
        with pytest.raises(CheckpointError) as caught:
            save_checkpoint(runs / "step_0000002", [model], hf_files=write_config, train_state=TrainState(step=2))
        assert list(runs.iterdir()) == []
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"cannot write the checkpoint {runs}/step_0000002: ")
    assert f"GB free at {runs}" in message
    assert ("File too large" if limit is file_size_limit else "No space left on device") in message
    assert capfd.readouterr().err == ""
    save_checkpoint(runs / "step_0000002", [model], hf_files=write_config, train_state=TrainState(step=2))
    load_checkpoint(runs / "step_0000002", [model])


def test_read_only_folder_is_named(hf_folder: Any, model: GlmvModel, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*/file/step_0000001: .*Not a directory"):
        save_checkpoint(tmp_path / "file" / "step_0000001", [model], hf_files=write_config)


def test_error_of_the_program_is_not_taken_for_a_full_disk(hf_folder: Any, model: GlmvModel, tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        raise RuntimeError("a mistake in the program")

    with pytest.raises(RuntimeError, match="a mistake in the program"):
        save_checkpoint(tmp_path / "step_0000001", [model], hf_files=fail)


def test_a_run_removes_what_killed_saves_left(hf_folder: Any, model: GlmvModel, checkpoint: Path) -> None:
    remnant = checkpoint.with_name(".unfinished_step_0000007")
    shutil.copytree(checkpoint, remnant)
    save_checkpoint(checkpoint.with_name("imported"), [model], hf_files=write_config)
    assert remnant.exists()  # an import does not own the folder
    save_checkpoint(checkpoint.with_name("step_0000008"), [model], hf_files=write_config, train_state=TrainState(8))
    assert not remnant.exists()
