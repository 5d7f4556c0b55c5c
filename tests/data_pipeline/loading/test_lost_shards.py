"""Shards that vanish while they are read: waited for, the same samples afterwards; lost for good, one clear reason."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data_pipeline.config import SourceConfig
from data_pipeline.errors import DataError, Interrupted, LostShard, Unavailable
from data_pipeline.shards.catalogue import find_shards
from data_pipeline.shards.index import read_index
from data_pipeline.shards.lost import LostShards
from data_pipeline.shards.reader import ShardReader
from data_pipeline.shards.tar import fingerprint
from tests.data_pipeline.loaders import digest, loader, stream, take


def move_away(folder: Path) -> list[tuple[Path, Path]]:
    """Rename all tars of a folder, and return (where they are, where they were)."""
    moved = [(path.with_suffix(".away"), path) for path in folder.glob("*.tar")]
    for away, path in moved:
        path.rename(away)
    return moved


def move_back(moved: list[tuple[Path, Path]]) -> None:
    for away, path in moved:
        away.rename(path)


@contextmanager
def after(seconds: float, action) -> Iterator[None]:
    timer = threading.Timer(seconds, action)
    timer.start()
    yield
    timer.join()


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_over_shards_that_are_gone_for_a_while_is_the_same(own_shards, workers):
    folder, config = own_shards
    config = replace(config, num_workers=workers, retry_seconds=30.0)
    wanted = stream(config, 8)
    packed = loader(config)
    moved = move_away(folder)
    with after(1.0, lambda: move_back(moved)):
        got = [[digest(batch) for batch in packed.next_step()] for _ in range(8)]
    packed.close()
    assert got == wanted


@pytest.mark.parametrize("workers", [0, 2])
def test_shard_that_stays_lost_ends_the_stream_with_one_reason(own_shards, workers):
    folder, config = own_shards
    packed = loader(replace(config, num_workers=workers, retry_seconds=0.5))
    move_away(folder)
    began = time.monotonic()
    with pytest.raises(
        DataError,
        match=r"a shard of source 'shards' is lost: .*\.tar cannot be opened \(No such file or directory\).*start the",
    ):
        take(packed, 8)
    packed.close()
    assert 0.5 <= time.monotonic() - began < 5


def test_wait_is_not_repeated_for_every_shard_and_said_once_per_shard(own_shards, caplog):
    """All shards are lost, and their samples are to be quarantined: hundreds of attempts, one wait."""
    folder, config = own_shards
    packed = loader(replace(config, retry_seconds=0.5, on_lost_shard="quarantine"))
    moved = move_away(folder)
    began = time.monotonic()
    with caplog.at_level(logging.WARNING, logger="glmv"):
        batches = take(packed, 2)
        seconds = time.monotonic() - began
        quarantined = [record for batch in batches for record in batch.quarantined]
        assert seconds < 0.5 * len(quarantined) / 2
        assert {record["reason"] for record in quarantined} == {"unreadable_shard"}
        [warning] = caplog.messages
        assert ".tar cannot be read (No such file or directory); trying again for up to 0.5 seconds" in warning
        move_back(moved)
        assert all(batch.num_samples for batch in take(packed, 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_wait_ends_at_once_when_the_run_stops_and_the_step_is_read_again(own_shards, workers):
    folder, config = own_shards
    config = replace(config, num_workers=workers, retry_seconds=60.0)
    wanted = stream(config, 8)
    packed = loader(config)
    moved = move_away(folder)
    with after(1.0, packed.stop_waiting):
        began = time.monotonic()
        with pytest.raises(Interrupted):
            take(packed, 8)
        assert time.monotonic() - began < 5
    state = packed.state_dict()
    packed.close()
    move_back(moved)
    assert stream(config, 8, state) == wanted


def test_step_that_is_not_used_is_read_again(own_shards):
    _, config = own_shards
    wanted = stream(config, 3)
    packed = loader(config)
    take(packed, 1)
    packed.unread()
    assert [digest(batch) for batch in packed.next_step()] == wanted[0]
    take(packed, 1)
    packed.unread()
    packed.unread()
    assert packed.state_dict() == after_steps(config, 1)
    assert [digest(batch) for batch in packed.next_step()] == wanted[1]


def after_steps(config, steps):
    packed = loader(config)
    take(packed, steps)
    return packed.state_dict()


def test_each_of_ten_thousand_shards_has_a_time_of_its_own():
    shards = [f"part-{number}.tar" for number in range(10_000)]
    lost, missing = LostShards(30, shards), []

    def read(may_wait: bool) -> None:
        missing.append([shard for shard in shards if lost.is_missing(shard)])
        if len(missing) == 1:
            raise Unavailable("it is away")

    lost.attempt(shards[17], read)
    assert missing == [[], [shards[17]]]


def read_first(reader: ShardReader, shard: Path, location: str = "") -> list[bytes]:
    return reader.read_members(location or str(shard), read_index(shard).sample(0), fingerprint(shard))


def test_shard_that_is_copied_back_is_read_when_it_is_whole(own_shards, tmp_path):
    folder, _ = own_shards
    shard = find_shards(str(folder))[0]
    index, mark, whole = read_index(shard), fingerprint(shard), shard.read_bytes()
    wanted = read_first(ShardReader(), shard)
    shard.unlink()
    reader = ShardReader(lost=LostShards(30, [str(shard)]))

    def copy_slowly() -> None:
        shard.write_bytes(whole[: len(whole) // 2])
        time.sleep(1)
        with open(shard, "ab") as file:
            file.write(whole[len(whole) // 2 :])

    with after(0.5, copy_slowly):
        last = index.sample(index.table.num_rows - 1)
        assert reader.read_members(str(shard), last, mark) == ShardReader().read_members(str(shard), last)
    assert read_first(reader, shard) == wanted


def test_storage_without_permission_is_not_waited_for(own_shards):
    """A folder in place of a shard: no wait helps."""
    folder, _ = own_shards
    shard = find_shards(str(folder))[0]
    index, mark = read_index(shard), fingerprint(shard)
    shard.unlink()
    shard.mkdir()
    began = time.monotonic()
    with pytest.raises(LostShard, match=r"cannot be read \(Is a directory\)"):
        ShardReader(lost=LostShards(30, [str(shard)])).read_members(str(shard), index.sample(0), mark)
    assert time.monotonic() - began < 5


# --- shards behind a URL ----------------------------------------------------------------------------------------------


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        pass


class Serving:
    """A web server that can be stopped and started again at the same port."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, 0

    def start(self) -> None:
        handler = partial(QuietHandler, directory=str(self.folder))
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_from_a_server_that_dies_and_returns_is_the_same(own_shards, tmp_path, workers):
    folder, config = own_shards
    wanted = stream(config, 8)
    server = Serving(folder)
    server.start()
    source = SourceConfig(f"http://127.0.0.1:{server.port}", name="shards")
    remote = replace(config, sources=[source], cache_dir=str(tmp_path / "cache"), num_workers=workers)
    packed = loader(replace(remote, retry_seconds=30.0))
    try:
        server.stop()
        with after(1.0, server.start):
            got = [[digest(batch) for batch in packed.next_step()] for _ in range(8)]
    finally:
        packed.close()
        server.stop()
    assert got == wanted


def test_shard_that_its_server_has_lost_comes_back_or_ends_the_stream(own_shards, tmp_path):
    folder, config = own_shards
    server = Serving(folder)
    server.start()
    source = SourceConfig(f"http://127.0.0.1:{server.port}", name="shards")
    remote = replace(config, sources=[source], cache_dir=str(tmp_path / "cache"))
    kept = Path(shutil.copytree(folder, tmp_path / "kept"))
    try:
        packed = loader(replace(remote, retry_seconds=30.0))
        moved = move_away(folder)
        with after(1.0, lambda: move_back(moved)):
            got = [[digest(batch) for batch in packed.next_step()] for _ in range(2)]
        assert got == stream(replace(config, sources=[SourceConfig(str(kept), name="shards")]), 2)
        shutil.rmtree(tmp_path / "cache")
        packed = loader(replace(remote, retry_seconds=0.5))
        move_away(folder)
        with pytest.raises(DataError, match=r"is lost: http://.*\.tar cannot be fetched: HTTPError: 404"):
            take(packed, 8)
    finally:
        server.stop()
