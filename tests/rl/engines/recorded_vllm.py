"""A stand-in for a vLLM server: answers as vLLM 0.32 was recorded to answer this project's client (vllm_0_32.jsonl).

Only the wire is imitated: what is drawn follows from the seed alone. It can refuse, hang and die as servers do.
"""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

RECORDING = Path(__file__).with_name("vllm_0_32.jsonl")


def recorded() -> list[dict[str, Any]]:
    """Return the recorded exchanges: method, path, body, status, answer."""
    return [json.loads(line) for line in RECORDING.read_text().splitlines()]


def exchanges(path: str, status: int = 200) -> list[dict[str, Any]]:
    return [each for each in recorded() if each["path"] == path and each["status"] == status]


def drawn_tokens(seed: int, most: int) -> list[int]:
    """Return what the stand-in draws with a seed: tokens above 100, and then the end of the turn."""
    return [*(100 + seed % 97 + place for place in range(4)), 9][:most]


Answer = tuple[int, Any]  # status and content


class RecordedVllm:
    """A server at an address of its own, until `close`.

    Args:
        tokenizer: The folder of the served model's tokenizer.

    Attributes:
        requests: (path, body) of all requests so far.
        generate: Called with the body of each request to draw; its status and answer are sent.
        answers: What other paths answer, as recorded unless changed.
        hangs: Whether nothing is answered any more, as after SIGSTOP.
        version: Of the weights.
    """

    def __init__(self, tokenizer: Path) -> None:
        self.requests: list[tuple[str, Any]] = []
        self.generate: Callable[[Any], Answer] = self.draw
        self.hangs = False
        self.version = "default"
        self.drawn = 0
        self.answers: dict[str, Answer] = {
            each["path"]: (200, each["answer"]) for each in recorded() if each["status"] == 200
        }
        self._described = exchanges("/collective_rpc")[0]["answer"]
        self._tokenizer = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        self._answer = exchanges("/inference/v1/generate")[0]["answer"]
        self._http = _server(self)
        self.address = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def draw(self, body: Any) -> Answer:
        """Return a recorded answer, with what is drawn with the seed of the request."""
        sampling = body["sampling_params"]
        tokens = drawn_tokens(sampling["seed"], sampling["max_tokens"])
        answer = copy.deepcopy(self._answer)
        answer["prompt_token_ids"] = body["token_ids"]
        choice = answer["choices"][0]
        choice["token_ids"] = tokens
        template = choice["logprobs"]["content"][0]
        choice["logprobs"]["content"] = [{**template, "token_id": token, "logprob": -token / 100} for token in tokens]
        ended = tokens[-1] in sampling["stop_token_ids"]
        choice["finish_reason"], choice["stop_reason"] = ("stop", tokens[-1]) if ended else ("length", None)
        choice["weight_versions"] = [{"version": self.version, "start": 0, "end": len(tokens)}]
        self.drawn += 1
        return 200, answer

    def answer(self, path: str, body: Any) -> Answer:
        if path == "/inference/v1/generate":
            return self.generate(body)
        if path == "/tokenize":
            ids = self._tokenizer.encode(body["prompt"], add_special_tokens=body["add_special_tokens"]).ids
            return 200, {**self.answers[path][1], "tokens": ids, "count": len(ids)}
        if path == "/collective_rpc" and body["method"] == "describe_policy":
            return 200, self._described
        if path == "/update_weight_version":
            self.version = body["new_version"]
        return self.answers.get(path, (404, {"detail": "Not Found"}))

    @property
    def described(self) -> dict[str, Any]:
        """What the worker says of the model; it may be changed."""
        return self._described["results"][0]

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


def _server(owner: RecordedVllm) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def _reply(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "null")
            owner.requests.append((self.path, body))
            while owner.hangs:
                time.sleep(0.05)
            status, content = owner.answer(self.path, body)
            if status == 0:  # the process is gone: the connection ends without an answer
                self.close_connection = True
                return
            data = b"" if content == "" else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = _reply

        def log_message(self, format: str, *args: Any) -> None: ...

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """The client no longer waits for an answer."""

    return Server(("127.0.0.1", 0), Handler)
