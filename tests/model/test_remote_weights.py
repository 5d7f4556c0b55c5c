"""Weights behind a URL: a real web server that fails at times, and fsspec's memory, compared with the local folder."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from common import storage
from common.storage import StorageError
from model.errors import ConfigError, WeightsError
from model.hf_file_names import CHECKSUMS
from model.weights import remote
from model.weights.formats.opened import open_folder
from model.weights.remote import REMOTE, SMALL_FILES, hf_folder, remote_of
from model.weights.source import WeightSource
from tests.hf_folders import save_whole_folder
from tests.model.range_server import RangeServer
from tests.model.test_hf_weights import sharded_copy
from tools.hf_output import HF_FILE_NAMES
from training.lora_base import base_fingerprint

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_whole_folder("glm4v", tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """Return a folder that a test may change."""
    return Path(shutil.copytree(saved, tmp_path / "GLM tiny"))


@pytest.fixture
def server(folder: Path) -> Iterator[RangeServer]:
    with RangeServer(folder) as serving:
        yield serving


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "DELAYS", (0.01, 0.01, 0.01))


def contents(source: WeightSource) -> dict[str, np.ndarray]:
    return {name: source.rows(name, 0, (*source.shape(name), 1)[0]).numpy() for name in source.names()}


def assert_equal(found: WeightSource, expected: WeightSource) -> None:
    a, b = contents(found), contents(expected)
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[name], b[name]) for name in a)


# --- what is read -----------------------------------------------------------------------------------------------------


def test_shards_with_an_index_and_quoted_names(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    sharded_copy(folder, tmp_path / "a b/sharded", 100_000)
    shutil.copy(folder / "config.json", tmp_path / "a b/sharded")
    with RangeServer(tmp_path) as server:
        for url in (f"{server.url}/a%20b/sharded/", f"file://{tmp_path}/a b/sharded"):
            copy = hf_folder(url)
            assert copy.name.startswith("sharded-")
            assert len(remote_of(copy).files) > 2  # type: ignore[union-attr]
            assert_equal(open_folder(copy).source, open_folder(folder).source)


def test_processes_of_a_machine_copy_small_files_once(server: RangeServer) -> None:
    processes = [multiprocessing.get_context("fork").Process(target=hf_folder, args=(server.url,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    copy = hf_folder(server.url)
    assert set(server.whole.values()) == {1}
    assert [path.name for path in copy.parent.iterdir() if not path.name.endswith(".lock")] == [copy.name]
    assert {path.name for path in copy.iterdir()} == set(server.whole) | {REMOTE}


def test_memory_of_fsspec_equals_the_local_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/models/tiny", recursive=True)
    source = open_folder(hf_folder("memory://models/tiny")).source
    assert_equal(source, open_folder(folder).source)
    monkeypatch.setattr(remote, "CHECK_SECONDS", 0.0)
    memory.pipe(f"/models/tiny/{WEIGHTS}", (folder / WEIGHTS).read_bytes())
    with pytest.raises(WeightsError, match=r"memory://models/tiny/model\.safetensors has changed since"):
        contents(source)
    memory.rm("/models/tiny", recursive=True)
    with pytest.raises(ConfigError, match=r"memory://models/tiny has no config\.json: a URL must be that of a Hugging"):
        hf_folder("memory://models/tiny")


def test_every_file_that_an_export_needs_is_copied() -> None:
    assert {*HF_FILE_NAMES, CHECKSUMS} <= set(SMALL_FILES)


def test_fingerprint_of_a_base_model_is_that_of_the_local_folder(folder: Path, server: RangeServer) -> None:
    copy = hf_folder(server.url)
    assert base_fingerprint(copy, 0) == base_fingerprint(folder, 0)
    sent = server.sent.total()
    assert base_fingerprint(copy, 0) == base_fingerprint(folder, 0)
    assert server.sent.total() == sent, "kept in the copy"


# --- servers that fail ------------------------------------------------------------------------------------------------


def test_requests_that_fail_for_a_while_are_repeated(folder: Path, server: RangeServer) -> None:
    server.failures = {"config.json": ["503"], WEIGHTS: ["429", "503", "503"]}
    source = open_folder(hf_folder(server.url)).source
    server.failures = {WEIGHTS: ["cut", "500", "cut"]}
    assert_equal(source, open_folder(folder).source)


def test_server_that_always_fails_is_named_without_its_signature(server: RangeServer) -> None:
    server.signature = "user=me&sig=c2Vj%2Bret"
    source = open_folder(hf_folder(f"{server.url}?{server.signature}")).source
    server.failures = {WEIGHTS: ["503"] * 4}
    with pytest.raises(
        StorageError, match=rf"{server.url}/{WEIGHTS} cannot be read \(HTTPError: 503 .*4 attempts"
    ) as failed:
        contents(source)
    assert "c2Vj" not in str(failed.value)
    for file in remote.cache_folder().rglob("*"):
        assert not file.is_file() or b"c2Vj" not in file.read_bytes()
    with pytest.raises(WeightsError, match=r"cannot be read: HTTPError: 403 ") as refused:
        hf_folder(f"{server.url}?sig=wrong")
    assert "wrong" not in str(refused.value)


def another_content(folder: Path, server: RangeServer) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)


CHANGES = {
    "another version": (another_content, r"has changed since it was opened \(another version of the same size\)"),
    "truncated": (lambda folder, _: os.truncate(folder / WEIGHTS, 5000), r"has changed since it was opened"),
    "gone": (lambda folder, _: (folder / WEIGHTS).unlink(), r"cannot be read: HTTPError: 404"),
    "ranges": (lambda _, server: setattr(server, "ranges", False), r"the server ignores Range and sends whole files"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_file_that_changes_between_reads_is_an_error(case: str, folder: Path, server: RangeServer) -> None:
    source = open_folder(hf_folder(server.url)).source
    change, expected = CHANGES[case]
    change(folder, server)
    with pytest.raises(WeightsError, match=f"{server.url}/{WEIGHTS}.*{expected}"):
        contents(source)


BAD = {
    "no config": (
        lambda folder, _: (folder / "config.json").unlink(),
        ConfigError,
        r"FOLDER has no config\.json: a URL must",
    ),
    "no weights": (
        lambda folder, _: (folder / WEIGHTS).unlink(),
        WeightsError,
        r"FOLDER has neither model\.safetensors nor",
    ),
    "truncated": (
        lambda folder, _: os.truncate(folder / WEIGHTS, 5000),
        WeightsError,
        r"FOLDER/model\.safetensors cannot be read as safetensors",
    ),
    "no ranges": (
        lambda _, server: setattr(server, "ranges", False),
        WeightsError,
        r"FOLDER/model\.safetensors: the server ignores Range",
    ),
    "a missing shard": (
        lambda folder, _: (folder / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),
        WeightsError,
        r"FOLDER has both|FOLDER lacks",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folder_is_refused_by_name(case: str, folder: Path, server: RangeServer) -> None:
    spoil, kind, expected = BAD[case]
    spoil(folder, server)
    with pytest.raises(kind, match=expected.replace("FOLDER", server.url)):
        open_folder(hf_folder(server.url))


def test_missing_package_and_unknown_protocol_are_named() -> None:
    with pytest.raises(WeightsError, match=r"gs://bucket/model cannot be read: ImportError: .*gcsfs"):
        hf_folder("gs://bucket/model")
    with pytest.raises(WeightsError, match=r"such://bucket/model cannot be read: ValueError: .*such"):
        hf_folder("such://bucket/model")


def test_cache_that_cannot_be_written_is_named(server: RangeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nothing")
    with pytest.raises(
        ConfigError, match=r"the small files of http.* cannot be written to /proc/nothing/.*XDG_CACHE_HOME"
    ):
        hf_folder(server.url)


def test_scalars_and_empty_reads(folder: Path, server: RangeServer) -> None:
    file = remote_of(hf_folder(server.url)).file(WEIGHTS)  # type: ignore[union-attr]
    file.read_into(memoryview(bytearray()), 0)
    with pytest.raises(EOFError, match="ends at byte"):
        file.read_into(memoryview(bytearray(2)), file.size - 1)
    assert torch.equal(
        *(open_folder(one).source.rows("lm_head.weight", 3, 5) for one in (folder, hf_folder(server.url)))
    )
