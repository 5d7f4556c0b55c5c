"""Shards behind a URL: a real web server that fails at times, fsspec's memory, and one cache for many processes."""

from __future__ import annotations

import multiprocessing
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from data_pipeline.config import SourceConfig
from data_pipeline.errors import BadSample, DataError
from data_pipeline.loading.source import Source
from data_pipeline.media.pixel_budget import PixelBudget
from data_pipeline.sharding.foreign import index_shards
from data_pipeline.shards import shard_cache
from data_pipeline.shards.catalogue import find_shards
from data_pipeline.shards.reader import ShardReader
from data_pipeline.shards.shard_cache import ShardCache
from data_pipeline.shards.tar import fingerprint
from tests.data_pipeline.shards.shard_files import open_files


class Server(ThreadingHTTPServer):
    """Serves a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.requests: Counter[str] = Counter()  # by file name
        self.failures: dict[str, list[str]] = {}  # by file name: how the first requests fail
        self.signature = ""  # must follow the `?` of every request
        self.head = 200  # the status of HEAD requests, if it is an error
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(SimpleHTTPRequestHandler):
    """Answers a request, or fails as the server is told."""

    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        path, _, query = self.path.partition("?")
        name = path.rpartition("/")[2]
        self.server.requests[name] += 1
        if self.server.signature != query:
            self.send_error(403)
            return
        failures = self.server.failures.get(name, [])
        match failures.pop(0) if failures else "":
            case "busy":
                self.send_error(503)
            case "cut":
                data = Path(self.translate_path(self.path)).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
            case "short":
                data = Path(self.translate_path(self.path)).read_bytes()[:-5000]
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            case _:
                super().do_GET()

    def do_HEAD(self) -> None:
        assert isinstance(self.server, Server)
        if self.server.head >= 400:
            self.send_error(self.server.head)
        else:
            super().do_HEAD()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def server(shards: Path) -> Iterator[Server]:
    with Server(shards) as serving:
        thread = threading.Thread(target=serving.serve_forever, args=(0.01,))
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_cache, "DELAYS", (0.01, 0.01, 0.01))


def open_source(path: str, tokenizer, cache: ShardCache) -> Source:
    return Source(SourceConfig(path), tokenizer_hash=tokenizer.hash, budget=PixelBudget(), cache=cache)


def copies(cache: ShardCache) -> set[Path]:
    return set(cache.folder.glob("*.tar"))


def contents(source: Source, reader: ShardReader) -> list:
    stored = [source.sample(row) for row in range(len(source))]
    return [reader.read(sample.shard, sample.sample, sample.tar_fingerprint) for sample in stored]


def test_folder_on_a_web_server_equals_the_local_folder(shards, server, tokenizer, tmp_path):
    cache = ShardCache(str(tmp_path / "cache"))
    local, remote = open_source(str(shards), tokenizer, cache), open_source(server.url, tokenizer, cache)
    assert remote.fingerprint == local.fingerprint
    assert contents(remote, ShardReader(cache=cache)) == contents(local, ShardReader())
    tars = [path.name for path in find_shards(str(shards))]
    assert server.requests == {"catalogue.arrow": 1, **dict.fromkeys(tars, 1)}, "one request per file, and no listing"
    contents(open_source(server.url, tokenizer, cache), ShardReader(cache=cache))
    assert server.requests.total() == len(tars) + 1, "the second time everything is in the cache"

    some = open_source(f"{server.url}/*0001.tar", tokenizer, cache)
    assert [shard.name for shard in some.shards] == ["shard-00000-00001.tar"]
    first = int(local.shard_rows[1])
    assert some.sample(0).sample == local.sample(first).sample
    assert some.lengths.tolist() == local.lengths[first : int(local.shard_rows[2])].tolist()
    with pytest.raises(DataError, match="matches none of the"):
        open_source(f"{server.url}/other-*.tar", tokenizer, cache)


@pytest.mark.parametrize("name", ["a b", "50%41", "图 ü", "x#y", "k[1]"])
def test_shard_names_are_quoted_in_urls(shards, server, tokenizer, tmp_path, name):
    for path in shards.glob("shard-00000-00000.*"):
        path.rename(path.with_name(name + path.name.removeprefix("shard-00000-00000")))
    index_shards(find_shards(str(shards)), tokenizer=tokenizer.folder)
    cache = ShardCache(str(tmp_path / "cache"))
    local = open_source(str(shards), tokenizer, cache)
    for url in (server.url, f"file://{shards}"):
        assert contents(open_source(url, tokenizer, cache), ShardReader(cache=cache)) == contents(local, ShardReader())
    one = open_source(str(shards / f"{name}.tar"), tokenizer, cache)
    assert [shard.name for shard in one.shards] == [f"{name}.tar"]


def test_signed_url_is_used_and_never_shown(shards, server, tokenizer, tmp_path):
    """Like a shared access signature of Azure: for all files of a folder, until it is renewed."""
    server.signature = "sv=1&sig=SECRET%2F"
    config = SourceConfig(f"{server.url}/?{server.signature}")
    cache = ShardCache(str(tmp_path / "cache"))
    assert "SECRET" not in SourceConfig(f"{server.url}/shards?{server.signature}").label()
    remote = open_source(config.path, tokenizer, cache)
    assert contents(remote, ShardReader(cache=cache)) == contents(
        open_source(str(shards), tokenizer, cache), ShardReader()
    )
    requests = server.requests.total()
    server.signature = "sv=1&sig=RENEWED"
    again = open_source(f"{server.url}?{server.signature}", tokenizer, cache)
    contents(again, ShardReader(cache=cache))
    assert server.requests.total() == requests, "the cache is used with any signature"

    sample = remote.sample(0)  # with the old signature
    for copy in (tmp_path / "cache").glob("*.tar"):
        copy.unlink()
        copy.mkdir()
    with pytest.raises(BadSample, match=r"00000\.tar cannot be read \(Is a directory\)") as error_of_read:
        ShardReader(cache=cache).read(sample.shard, sample.sample, sample.tar_fingerprint)
    fresh = ShardCache(str(tmp_path / "fresh"))
    with pytest.raises(BadSample, match=r"cannot be fetched: .*403") as error_of_open:
        fresh.open(sample.shard, sample.tar_fingerprint)
    with pytest.raises(DataError, match=r"catalogue\.arrow cannot be fetched .*403") as error_of_catalogue:
        open_source(config.path, tokenizer, fresh)
    with pytest.raises(DataError, match="matches none of the") as error_of_pattern:
        open_source(f"{server.url}/other-*.tar?{server.signature}", tokenizer, fresh)
    for error in (error_of_read, error_of_open, error_of_catalogue, error_of_pattern):
        assert "SECRET" not in str(error.value)
        assert "RENEWED" not in str(error.value)


@pytest.mark.parametrize("status", [400, 403, 405, 501])
def test_server_that_refuses_head_is_asked_with_get(shards, server, tokenizer, tmp_path, status):
    server.head = status
    source = open_source(server.url, tokenizer, ShardCache(str(tmp_path)))
    assert contents(source, ShardReader()) == contents(open_source(str(shards), tokenizer, ShardCache()), ShardReader())


def test_refused_catalogue_is_not_said_to_be_missing(shards, server, tokenizer, tmp_path):
    server.signature = "sig=1"
    with pytest.raises(DataError, match=r"403.*: check the address and the right to read it$"):
        open_source(server.url, tokenizer, ShardCache(str(tmp_path)))


def test_fsspec_urls_equal_the_local_folder(shards, tokenizer, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.put(str(shards) + "/", "/bucket/captions/", recursive=True)
    cache = ShardCache(str(tmp_path / "cache"))
    expected = contents(open_source(str(shards), tokenizer, cache), ShardReader())
    for url in ("memory://bucket/captions", f"file://{shards}/"):
        assert contents(open_source(url, tokenizer, cache), ShardReader(cache=cache)) == expected


def test_catalogue_that_was_written_again_is_fetched_again(shards, server, tokenizer, tmp_path):
    cache = ShardCache(str(tmp_path / "cache"))
    before = len(open_source(server.url, tokenizer, cache))
    for path in shards.glob("shard-00000-00000.*"):
        path.unlink()
    index_shards(find_shards(str(shards)), tokenizer=tokenizer.folder)
    assert len(open_source(server.url, tokenizer, cache)) < before


def test_damaged_copy_of_the_catalogue_is_fetched_again_once(shards, server, tokenizer, tmp_path):
    cache = ShardCache(str(tmp_path / "cache"))
    expected = open_source(server.url, tokenizer, cache).fingerprint
    [copy] = (tmp_path / "cache").glob("*.arrow")
    data = copy.read_bytes()
    copy.write_bytes(data[:1000] + b"?" + data[1001:])
    assert open_source(server.url, tokenizer, cache).fingerprint == expected
    assert copy.read_bytes() == data
    (shards / "catalogue.arrow").write_bytes(data[:-1])
    with pytest.raises(DataError, match=r"is damaged .*: write http.*/catalogue\.arrow again"):
        open_source(server.url, tokenizer, cache)


def test_requests_that_fail_at_times_are_repeated(shards, server, tokenizer, tmp_path):
    server.failures = {
        "shard-00000-00000.tar": ["busy", "cut", "cut"],
        "catalogue.arrow": ["busy"],
        "shard-00000-00001.tar": ["short"],
    }
    cache = ShardCache(str(tmp_path / "cache"))
    source = open_source(server.url, tokenizer, cache)
    assert contents(source, ShardReader(cache=cache)) == contents(
        open_source(str(shards), tokenizer, cache), ShardReader()
    )
    assert (server.requests["shard-00000-00000.tar"], server.requests["shard-00000-00001.tar"]) == (4, 2)
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_shard_that_cannot_be_fetched_is_not_requested_for_every_sample(shards, server, tokenizer, tmp_path):
    cache = ShardCache(str(tmp_path / "cache"))
    source = open_source(server.url, tokenizer, cache)
    (shards / "shard-00000-00000.tar").unlink()
    reader = ShardReader(cache=cache)
    sample = source.sample(0)
    for _ in range(3):
        with pytest.raises(BadSample, match=r"unreadable_shard: .*shard-00000-00000\.tar cannot be fetched: .*404"):
            reader.read(sample.shard, sample.sample, sample.tar_fingerprint)
    assert server.requests["shard-00000-00000.tar"] == 1
    assert not list(cache.folder.glob("*.tmp"))
    last = source.sample(len(source) - 1)
    assert reader.read(last.shard, last.sample, last.tar_fingerprint).record


def test_damaged_copy_is_fetched_again_once(shards, server, tokenizer, tmp_path):
    cache = ShardCache(str(tmp_path / "cache"))
    source = open_source(server.url, tokenizer, cache)
    sample = source.sample(0)
    descriptor = cache.open(sample.shard, sample.tar_fingerprint)
    assert descriptor > 0
    [copy] = (tmp_path / "cache").glob("*.tar")
    intact = copy.read_bytes()

    def damage(path: Path) -> None:
        with open(path, "r+b") as file:
            file.seek(sample.sample.members[0].offset)
            file.write(b"\xff" * 20)

    damage(copy)
    reader = ShardReader(cache=cache)
    assert reader.read(sample.shard, sample.sample, sample.tar_fingerprint).record
    assert copy.read_bytes() == intact
    damage(copy)  # in place, so the reader's open file is damaged too
    damage(shards / sample.shard_name)
    reader = ShardReader(cache=cache)
    for _ in range(3):
        with pytest.raises(BadSample, match="checksum"):
            reader.read(sample.shard, sample.sample, sample.tar_fingerprint)
    assert server.requests[sample.shard_name] == 3


def test_full_cache_removes_the_least_recently_opened_shard(shards, server, tmp_path):
    tars = find_shards(str(shards))
    sizes = [tar.stat().st_size for tar in tars]
    cache = ShardCache(str(tmp_path / "cache"), max_bytes=sizes[0] + sizes[1] + sizes[2] // 2)
    urls = [f"{server.url}/{tar.name}" for tar in tars]
    prints = [fingerprint(tar) for tar in tars]
    cache.open(urls[0], prints[0])
    first = copies(cache)
    cache.open(urls[1], prints[1])
    second = copies(cache) - first
    cache.open(urls[0], prints[0])
    cache.open(urls[2], prints[2])
    kept = copies(cache)
    assert first < kept
    assert len(kept - first) == 1
    assert not second & kept
    assert sum(path.stat().st_size for path in kept) <= cache.max_bytes


def test_cache_smaller_than_a_shard_holds_one_copy_and_closes_removed_ones(shards, server, tokenizer, tmp_path):
    cache = ShardCache(str(tmp_path / "cache"), max_bytes=1)
    source, reader = open_source(server.url, tokenizer, cache), ShardReader(cache=cache)
    assert contents(source, reader) == contents(open_source(str(shards), tokenizer, cache), ShardReader())
    assert len(copies(cache)) == 1
    tars = [path for path in open_files(cache.folder) if ".tar" in path]
    assert len(tars) <= 2, "removed files that stay open would fill the disk"


def test_cache_never_removes_tars_that_it_has_not_fetched(shards, tmp_path):
    """A user may choose a folder that holds other shards."""
    first, second = find_shards(str(shards))[:2]
    cache = ShardCache(str(shards), max_bytes=1)
    other = Path(shutil.copytree(shards, tmp_path / "other"))
    for tar in (first, second):
        cache.open(f"file://{other}/{tar.name}", fingerprint(tar))
    assert first.exists()
    assert second.exists()
    assert len(list(shards.glob("*.tar"))) == len(find_shards(str(other))) + 1


def test_copy_that_vanishes_while_the_cache_is_cleaned_is_skipped(shards, tmp_path):
    """Another process removes it after the folder was listed. A dangling link is such a file at any time."""
    tar = find_shards(str(shards))[0]
    cache = ShardCache(str(tmp_path / "cache"), max_bytes=1)
    cache.folder.mkdir()
    (cache.folder / ("0" * 32 + ".tar")).symlink_to(tmp_path / "nowhere")
    assert cache.open(f"file://{tar}", fingerprint(tar))


def test_full_disk_and_unusable_folder_are_named(shards, tmp_path):
    tar = find_shards(str(shards))[0]
    url, print_ = f"file://{tar}", fingerprint(tar)
    elsewhere = ShardCache(str(tmp_path / "elsewhere"))
    elsewhere.open(url, print_)
    [copy] = copies(elsewhere)
    cache = ShardCache(str(tmp_path / "cache"))
    cache.folder.mkdir()
    (cache.folder / copy.with_suffix(".tmp").name).symlink_to("/dev/full")
    with pytest.raises(BadSample, match=r"data\.cache_dir .*cache is full \(No space .*set data\.cache_bytes"):
        cache.open(url, print_)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data\.cache_dir .*file cannot be written \(File exists\): choose a folder"):
        ShardCache(str(tmp_path / "file")).catalogue(f"file://{shards}/catalogue.arrow")


def _read_everything(url: str, folder: str, tokenizer_hash: str, barrier, results) -> None:
    cache = ShardCache(folder)
    barrier.wait()
    source = Source(SourceConfig(url), tokenizer_hash=tokenizer_hash, budget=PixelBudget(), cache=cache)
    results.put(len(contents(source, ShardReader(cache=cache))))


def test_processes_share_one_cache(shards, server, tokenizer, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    arguments = (server.url, str(tmp_path / "cache"), tokenizer.hash, barrier, results)
    processes = [context.Process(target=_read_everything, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    assert {results.get(timeout=60) for _ in processes} == {40}
    for process in processes:
        process.join()
    assert set(server.requests.values()) == {1}, "every file is fetched once for all four"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        (
            "http://127.0.0.1:1/shards",
            "catalogue.arrow cannot be fetched .*: check the address",
        ),
        (
            "memory://nowhere",
            "catalogue.arrow cannot be fetched .*FileNotFoundError.*: a source that is a URL",
        ),
        ("s3://bucket/shards", "cannot be fetched .*Install s3fs"),
        ("nothing://bucket/shards", "cannot be fetched .*nothing"),
    ],
)
def test_url_without_a_readable_catalogue_is_an_error(url, says, tokenizer, tmp_path):
    with pytest.raises(DataError, match=says):
        open_source(url, tokenizer, ShardCache(str(tmp_path)))
