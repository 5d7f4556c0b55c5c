"""Recaptioning with a real program and with a real server on this machine."""

from __future__ import annotations

import base64
import io
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_pipeline.curation.candidate import Candidate
from data_pipeline.curation.recaption import Recaption, Recaptioner
from data_pipeline.errors import DataError
from tests.data_pipeline.curation.samples import PHOTOS, candidate, file_of, photo


def samples(count: int = 6) -> list[Candidate]:
    return [
        candidate(f"Caption {number}.", [file_of(photo(PHOTOS[number % 6], 40), "JPEG")], name=f"shard.tar/{number}")
        for number in range(count)
    ]


def recaptioned(options: Recaption, given: list[Candidate], cache: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return records and failures."""
    options.check()
    failed: list[tuple[str, str]] = []
    with Recaptioner(options, cache, lambda *said: failed.append(said)) as captioner:
        return captioner.records(given), dict(failed)


# --- a program --------------------------------------------------------------------------------------------------------

PROGRAM = """
import json, os, sys, time
from PIL import Image
print("started", file=open({log!r}, "a"))
for line in sys.stdin:
    asked = json.loads(line)
    print(asked["key"], file=open({log!r}, "a"))
    number = asked["key"].rpartition("/")[2]
    if number in {ends!r}: sys.exit(7)
    if number in {hangs!r}: time.sleep(60)
    answer = json.dumps({{"text": f"{{Image.open(asked['image']).size}} {{asked['text']}}"}})
    answer = "not JSON" if number in {babbles!r} else answer
    print("" if number in {silent!r} else answer, flush=True)
"""


def program(folder: Path, **misbehaving: Any) -> tuple[str, Path]:
    """Return a command, and the file in which it logs its questions."""
    log = folder / "log.txt"
    log.touch()
    behaviour = {"ends": "", "hangs": "", "babbles": "", "silent": "", **misbehaving}
    (folder / "caption.py").write_text(PROGRAM.format(log=str(log), **behaviour))
    return f"{sys.executable} '{folder / 'caption.py'}'", log


def test_a_program_is_started_once_and_asked_once_per_sample(tmp_path: Path) -> None:
    command, log = program(tmp_path)
    options = Recaption(command=command, concurrency=1)
    records, failed = recaptioned(options, samples(), tmp_path / "answers.jsonl")
    for sample, record in zip(samples(), records, strict=True):
        size = Image.open(io.BytesIO(sample.images[0])).size
        assert record == {"domain": "image_text", "text": f"{size} {sample.text}", "original_text": sample.text}
    assert not failed
    assert log.read_text().split() == ["started", *(f"shard.tar/{number}" for number in range(6))]

    # A crash cut off the last answer: only this sample is asked again.
    cache = tmp_path / "answers.jsonl"
    cache.write_bytes(cache.read_bytes()[:-5])
    assert recaptioned(options, samples(), cache) == (records, {})
    assert recaptioned(options, samples(), cache) == (records, {})
    assert log.read_text().split()[7:] == ["started", "shard.tar/5"]

    # Another program is asked again.
    recaptioned(Recaption(command=f"{command} x", concurrency=1), samples(1), cache)
    assert log.read_text().split()[9:] == ["started", "shard.tar/0"]


def test_a_sample_whose_recaption_fails_keeps_its_caption(tmp_path: Path) -> None:
    command, log = program(tmp_path, ends="0", hangs="1", babbles="2", silent="3")
    options = Recaption(command=command, concurrency=1, timeout=10)
    records, failed = recaptioned(options, samples(), tmp_path / "answers.jsonl")
    assert [("original_text" in record) for record in records] == [False] * 4 + [True] * 2
    assert records[:4] == [sample.record for sample in samples()[:4]]
    assert {name[-1]: reason.split(":")[0] for name, reason in failed.items()} == {
        "0": "the command ended with status 7",
        "1": "no answer in 10 seconds",
        "2": "the command failed",
        "3": "the command failed",
    }
    assert log.read_text().split().count("started") == 5


def test_a_program_may_remove_the_image(tmp_path: Path) -> None:
    (tmp_path / "remove.py").write_text(
        "import json, os\nos.remove(json.loads(input())['image'])\nprint(json.dumps({'text': 'A cat.'}), flush=True)"
    )
    command = f"{sys.executable} '{tmp_path / 'remove.py'}'"
    [record], failed = recaptioned(Recaption(command=command), samples(1), tmp_path / "answers.jsonl")
    assert record["text"] == "A cat."
    assert not failed


def test_the_choice_by_ratio_depends_on_the_name_alone(tmp_path: Path) -> None:
    options = Recaption(command="cat", ratio=0.3)
    many = [candidate("A cat.", [b""], name=f"shard.tar/{number}") for number in range(2000)]
    chosen = [options.chosen(sample) for sample in many]
    assert 520 < sum(chosen) < 680
    assert [options.chosen(sample) for sample in many[::-1]] == chosen[::-1]
    more = Recaption(command="cat", ratio=0.6)
    assert all(more.chosen(sample) for sample, before in zip(many, chosen, strict=True) if before)
    assert not any(Recaption(command="cat", ratio=0).chosen(sample) for sample in many)
    assert all(Recaption(command="cat", ratio=1).chosen(sample) for sample in many)
    assert not options.chosen(candidate("Words.", domain="text"))


# --- a server ---------------------------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Answers as OpenAI's API. responses: caption -> statuses to answer with before a good answer."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.responses: dict[str, list[int]] = {}
        self.asked: list[dict[str, Any]] = []
        self.headers_seen: set[str | None] = set()
        self.concurrent = self.max_concurrent = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        image, prompt = body["messages"][0]["content"]
        caption = prompt["text"].removeprefix("Better than: ")
        with self.server.lock:
            self.server.asked.append(body)
            self.server.headers_seen.add(self.headers["Authorization"])
            self.server.concurrent += 1
            self.server.max_concurrent = max(self.server.concurrent, self.server.max_concurrent)
            statuses = self.server.responses.get(caption)
            status = statuses.pop(0) if statuses else 200
        threading.Event().wait(0.05)
        kind, _, data = image["image_url"]["url"].partition(";base64,")
        with Image.open(io.BytesIO(base64.b64decode(data))) as decoded:
            assert kind == f"data:image/{(decoded.format or '').lower()}"
            content = f"{decoded.size} {caption}"
        answer = json.dumps({"choices": [{"message": {"content": content}}]} if status == 200 else {"error": status})
        with self.server.lock:
            self.server.concurrent -= 1
        self.send_response(200 if self.path == "/v1/chat/completions" and status == 200 else status)
        self.end_headers()
        self.wfile.write(answer.encode() if status != 299 else b"<html>")

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def test_a_server_is_asked_again_after_temporary_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPTION_KEY", "secret")
    with serving() as server:
        options = Recaption(
            endpoint=server.url, model="tiny", prompt="Better than: {text}", api_key_variable="CAPTION_KEY", retries=1
        )
        server.responses = {"Caption 1.": [503], "Caption 2.": [400], "Caption 3.": [500, 429]}
        records, failed = recaptioned(options, samples(12), tmp_path / "answers.jsonl")
        good = [number for number in range(12) if number not in (2, 3)]
        for number, sample in enumerate(samples(12)):
            if number in good:
                size = Image.open(io.BytesIO(sample.images[0])).size
                assert records[number]["text"] == f"{size} {sample.text}"
                assert records[number]["original_text"] == sample.text
            else:
                assert records[number] == sample.record
        assert {name[-1]: reason.split(":")[0] for name, reason in failed.items()} == {
            "2": "status 400",
            "3": "status 429 (requests",
        }
        assert len(server.asked) == 12 + 2
        assert {(body["model"], body["temperature"]) for body in server.asked} == {("tiny", 0)}
        assert server.headers_seen == {"Bearer secret"}
        assert 1 < server.max_concurrent <= 4

        again, failed = recaptioned(options, samples(12), tmp_path / "answers.jsonl")
        assert not failed  # only those two are asked again
        assert len(server.asked) == 14 + 2
        assert [record["text"] for record in again if "original_text" in record][:2] == [
            record["text"] for record in records[:2]
        ]


def test_an_unreachable_server_ends_the_curation(tmp_path: Path) -> None:
    with serving() as server:
        url = server.url
    options = Recaption(endpoint=url, model="tiny", retries=0)
    records, failed = recaptioned(options, samples(1), tmp_path / "answers.jsonl")
    assert records == [samples(1)[0].record]
    assert failed == {"shard.tar/0": "ConnectionError (requests: 1)"}
    with pytest.raises(DataError, match="all requests fail, such as ConnectionError"):
        recaptioned(options, samples(40), tmp_path / "answers.jsonl")
