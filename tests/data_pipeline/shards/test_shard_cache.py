"""Shards behind a URL: a real web server that fails now and then, fsspec's memory, and one cache for many processes."""

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


class Server(ThreadingHTTPServer):
    """Serves a folder. asked: requests for a file by name; broken: how often to fail first, and how; signature: what
    must stand behind the `?` of every request."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.asked: Counter[str] = Counter()
        self.broken: dict[str, list[str]] = {}
        self.signature = ""
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        path, _, query = self.path.partition("?")
        name = path.rpartition("/")[2]
        self.server.asked[name] += 1
        if self.server.signature != query:
            self.send_error(403)
            return
        failures = self.server.broken.get(name, [])
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

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def shards(shard_folders: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(shard_folders[1], tmp_path / "shards"))


@pytest.fixture
def server(shards: Path) -> Iterator[Server]:
    with Server(shards) as serving:
        thread = threading.Thread(target=serving.serve_forever, args=(0.01,))
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_cache, "DELAYS", (0.01, 0.01, 0.01))


def opened(path: str, tokenizer, cache: ShardCache) -> Source:
    return Source(SourceConfig(path), tokenizer_hash=tokenizer.hash, budget=PixelBudget(), cache=cache)


def contents(source: Source, reader: ShardReader) -> list:
    stored = [source.sample(row) for row in range(len(source))]
    return [reader.read(sample.shard, sample.sample, sample.tar_fingerprint) for sample in stored]


def test_a_folder_behind_a_web_server(shards, server, tokenizer, tmp_path):
    cache = ShardCache(str(tmp_path / "cache"))
    local, far = opened(str(shards), tokenizer, cache), opened(server.url, tokenizer, cache)
    assert far.fingerprint == local.fingerprint
    assert contents(far, ShardReader(cache=cache)) == contents(local, ShardReader())
    tars = [path.name for path in find_shards(str(shards))]
    assert server.asked == {"catalogue.arrow": 1, **dict.fromkeys(tars, 1)}, "one request a file, and no listing"
    contents(opened(server.url, tokenizer, cache), ShardReader(cache=cache))
    assert server.asked.total() == len(tars) + 1, "the second time all is there"

    some = opened(f"{server.url}/*0001.tar", tokenizer, cache)
    assert [shard.name for shard in some.shards] == ["shard-00000-00001.tar"]
    first = int(local.shard_rows[1])
    assert some.sample(0).sample == local.sample(first).sample
    assert some.lengths.tolist() == local.lengths[first : int(local.shard_rows[2])].tolist()
    with pytest.raises(DataError, match="stands for none of the"):
        opened(f"{server.url}/other-*.tar", tokenizer, cache)


@pytest.mark.parametrize("name", ["a b", "50%41", "图 ü", "x#y", "k[1]"])
def test_names_of_shards_that_a_url_must_quote(shards, server, tokenizer, tmp_path, name):
    for path in shards.glob("shard-00000-00000.*"):
        path.rename(path.with_name(name + path.name.removeprefix("shard-00000-00000")))
    index_shards(find_shards(str(shards)), tokenizer=tokenizer.folder)
    cache = ShardCache(str(tmp_path / "cache"))
    local = opened(str(shards), tokenizer, cache)
    for url in (server.url, f"file://{shards}"):
        assert contents(opened(url, tokenizer, cache), ShardReader(cache=cache)) == contents(local, ShardReader())
    one = opened(str(shards / f"{name}.tar"), tokenizer, cache)
    assert [shard.name for shard in one.shards] == [f"{name}.tar"]


def test_a_signed_address(shards, server, tokenizer, tmp_path):
    """As a shared access signature of Azure is: for all files of a folder, until it is renewed."""
    server.signature = "sv=1&sig=SECRET%2F"
    config = SourceConfig(f"{server.url}/?{server.signature}")
    cache = ShardCache(str(tmp_path / "cache"))
    assert "SECRET" not in SourceConfig(f"{server.url}/shards?{server.signature}").label()
    far = opened(config.path, tokenizer, cache)
    assert contents(far, ShardReader(cache=cache)) == contents(opened(str(shards), tokenizer, cache), ShardReader())
    asked = server.asked.total()
    server.signature = "sv=1&sig=RENEWED"
    again = opened(f"{server.url}?{server.signature}", tokenizer, cache)
    contents(again, ShardReader(cache=cache))
    assert server.asked.total() == asked, "what is there is used with any signature"

    fresh = ShardCache(str(tmp_path / "fresh"))
    sample = far.sample(0)  # with the old signature
    with pytest.raises(BadSample, match=r"cannot be fetched: .*403") as refused:
        fresh.open(sample.shard, sample.tar_fingerprint)
    with pytest.raises(DataError, match=r"catalogue\.arrow cannot be fetched .*403") as refused_too:
        opened(config.path, tokenizer, fresh)
    with pytest.raises(DataError, match="stands for none of the") as nothing:
        opened(f"{server.url}/other-*.tar?{server.signature}", tokenizer, fresh)
    for error in (refused, refused_too, nothing):
        assert "SECRET" not in str(error.value)
        assert "RENEWED" not in str(error.value)


def test_fsspec_urls(shards, tokenizer, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.put(str(shards) + "/", "/bucket/captions/", recursive=True)
    cache = ShardCache(str(tmp_path / "cache"))
    wanted = contents(opened(str(shards), tokenizer, cache), ShardReader())
    for url in ("memory://bucket/captions", f"file://{shards}/"):
        assert contents(opened(url, tokenizer, cache), ShardReader(cache=cache)) == wanted


def test_a_catalogue_that_was_written_anew_is_fetched_again(shards, server, tokenizer, tmp_path):
    cache = ShardCache(str(tmp_path / "cache"))
    before = len(opened(server.url, tokenizer, cache))
    for path in shards.glob("shard-00000-00000.*"):
        path.unlink()
    index_shards(find_shards(str(shards)), tokenizer=tokenizer.folder)
    assert len(opened(server.url, tokenizer, cache)) < before


def test_a_damaged_copy_of_the_catalogue_is_fetched_again_once(shards, server, tokenizer, tmp_path):
    cache = ShardCache(str(tmp_path / "cache"))
    wanted = opened(server.url, tokenizer, cache).fingerprint
    [copy] = (tmp_path / "cache").glob("*.arrow")
    data = copy.read_bytes()
    copy.write_bytes(data[:1000] + b"?" + data[1001:])
    assert opened(server.url, tokenizer, cache).fingerprint == wanted
    assert copy.read_bytes() == data
    (shards / "catalogue.arrow").write_bytes(data[:-1])
    with pytest.raises(DataError, match=r"is damaged .*: write http.*/catalogue\.arrow anew"):
        opened(server.url, tokenizer, cache)


def test_a_network_that_fails_now_and_then(shards, server, tokenizer, tmp_path):
    server.broken = {
        "shard-00000-00000.tar": ["busy", "cut", "cut"],
        "catalogue.arrow": ["busy"],
        "shard-00000-00001.tar": ["short"],
    }
    cache = ShardCache(str(tmp_path / "cache"))
    source = opened(server.url, tokenizer, cache)
    assert contents(source, ShardReader(cache=cache)) == contents(opened(str(shards), tokenizer, cache), ShardReader())
    assert (server.asked["shard-00000-00000.tar"], server.asked["shard-00000-00001.tar"]) == (4, 2)
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_a_shard_that_cannot_be_fetched_is_not_asked_for_at_every_sample(shards, server, tokenizer, tmp_path):
    cache = ShardCache(str(tmp_path / "cache"))
    source = opened(server.url, tokenizer, cache)
    (shards / "shard-00000-00000.tar").unlink()
    reader = ShardReader(cache=cache)
    sample = source.sample(0)
    for _ in range(3):
        with pytest.raises(BadSample, match=r"unreadable_shard: .*shard-00000-00000\.tar cannot be fetched: .*404"):
            reader.read(sample.shard, sample.sample, sample.tar_fingerprint)
    assert server.asked["shard-00000-00000.tar"] == 1
    assert not list(cache.folder.glob("*.tmp"))
    last = source.sample(len(source) - 1)
    assert reader.read(last.shard, last.sample, last.tar_fingerprint).record


def test_a_damaged_copy_is_fetched_again_once(shards, server, tokenizer, tmp_path):
    cache = ShardCache(str(tmp_path / "cache"))
    source = opened(server.url, tokenizer, cache)
    sample = source.sample(0)
    descriptor = cache.open(sample.shard, sample.tar_fingerprint)
    assert descriptor > 0
    [copy] = (tmp_path / "cache").glob("*.tar")
    whole = copy.read_bytes()

    def damage(path: Path) -> None:
        with open(path, "r+b") as file:
            file.seek(sample.sample.members[0].offset)
            file.write(b"\xff" * 20)

    damage(copy)
    reader = ShardReader(cache=cache)
    assert reader.read(sample.shard, sample.sample, sample.tar_fingerprint).record
    assert copy.read_bytes() == whole
    damage(copy)  # in place, so the reader's open file has it too
    damage(shards / sample.shard_name)
    reader = ShardReader(cache=cache)
    for _ in range(3):
        with pytest.raises(BadSample, match="checksum"):
            reader.read(sample.shard, sample.sample, sample.tar_fingerprint)
    assert server.asked[sample.shard_name] == 3


def test_what_was_not_used_for_longest_leaves_a_full_cache(shards, server, tokenizer, tmp_path):
    tars = find_shards(str(shards))
    sizes = [tar.stat().st_size for tar in tars]
    cache = ShardCache(str(tmp_path / "cache"), max_bytes=sizes[0] + sizes[1] + sizes[2] // 2)
    urls = [f"{server.url}/{tar.name}" for tar in tars]
    prints = [fingerprint(tar) for tar in tars]
    held = cache.open(urls[0], prints[0])
    cache.open(urls[1], prints[1])
    cache.open(urls[0], prints[0])
    cache.open(urls[2], prints[2])
    kept = set((tmp_path / "cache").glob("*.tar"))
    assert cache._path(urls[1], prints[1]) not in kept
    assert cache._path(urls[2], prints[2]) in kept
    assert sum(path.stat().st_size for path in kept) <= cache.max_bytes
    reader = ShardReader(cache=ShardCache(str(tmp_path / "cache"), max_bytes=1))
    source = opened(server.url, tokenizer, cache)
    assert contents(source, reader) == contents(opened(str(shards), tokenizer, cache), ShardReader())
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 1
    assert len(reader._open) <= 2, "files that were removed are closed, or the disk would fill up"
    assert held


def test_a_cache_leaves_tars_alone_that_it_has_not_fetched(shards, tmp_path):
    """A user may name a folder that has shards of his own."""
    first, second = find_shards(str(shards))[:2]
    cache = ShardCache(str(shards), max_bytes=1)
    other = Path(shutil.copytree(shards, tmp_path / "other"))
    for tar in (first, second):
        cache.open(f"file://{other}/{tar.name}", fingerprint(tar))
    assert first.exists()
    assert second.exists()
    assert len(list(shards.glob("*.tar"))) == len(find_shards(str(other))) + 1


def test_a_copy_that_goes_while_room_is_made(shards, tmp_path):
    """Another process discards it between the listing of the folder and the look at its size; a link to nowhere is such
    a file at any time."""
    tar = find_shards(str(shards))[0]
    cache = ShardCache(str(tmp_path / "cache"), max_bytes=1)
    cache.folder.mkdir()
    (cache.folder / ("0" * 32 + ".tar")).symlink_to(tmp_path / "nowhere")
    assert cache.open(f"file://{tar}", fingerprint(tar))


def test_a_full_disk_and_a_folder_that_cannot_be_written(shards, tmp_path):
    tar = find_shards(str(shards))[0]
    url, print_ = f"file://{tar}", fingerprint(tar)
    cache = ShardCache(str(tmp_path / "cache"))
    cache.folder.mkdir()
    cache._path(url, print_).with_suffix(".tmp").symlink_to("/dev/full")
    with pytest.raises(BadSample, match=r"data\.cache_dir .*cache is full \(No space .*set data\.cache_bytes"):
        cache.open(url, print_)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data\.cache_dir .*file cannot be written \(File exists\): name a folder"):
        ShardCache(str(tmp_path / "file")).catalogue(f"file://{shards}/catalogue.arrow")


def _read_everything(url: str, folder: str, tokenizer_hash: str, barrier, results) -> None:
    cache = ShardCache(folder)
    barrier.wait()
    source = Source(SourceConfig(url), tokenizer_hash=tokenizer_hash, budget=PixelBudget(), cache=cache)
    results.put(len(contents(source, ShardReader(cache=cache))))


def test_processes_share_a_cache(shards, server, tokenizer, tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    arguments = (server.url, str(tmp_path / "cache"), tokenizer.hash, barrier, results)
    processes = [context.Process(target=_read_everything, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    assert {results.get(timeout=60) for _ in processes} == {40}
    for process in processes:
        process.join()
    assert set(server.asked.values()) == {1}, "every file was fetched once for all four"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        (
            "http://127.0.0.1:1/shards",
            "catalogue.arrow cannot be fetched .*: a source that is a URL needs the catalogue",
        ),
        ("memory://nowhere", "catalogue.arrow cannot be fetched .*FileNotFoundError"),
        ("s3://bucket/shards", "cannot be fetched .*Install s3fs"),
        ("nothing://bucket/shards", "cannot be fetched .*nothing"),
    ],
)
def test_urls_that_cannot_be_opened(url, says, tokenizer, tmp_path):
    with pytest.raises(DataError, match=says):
        opened(url, tokenizer, ShardCache(str(tmp_path)))
