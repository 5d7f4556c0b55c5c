"""New captions from a program or a model server, for a share of the kept samples.

A command reads one JSON line {"key", "image", "text"} per sample and answers with a line {"text": "..."}. `image` is
the path of an image file that exists until the answer. The command is started once per thread. An endpoint is any
server with OpenAI's /chat/completions, such as vLLM or SGLang.

The record keeps both captions: `text` is the new one, `original_text` the old one. A sample whose recaption fails keeps
its caption and is counted. Answers are stored on disk as they arrive, so that nothing is asked twice.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import requests
from PIL import Image

from common.nearest import suggestion
from common.readable import is_readable
from data_pipeline.curation.candidate import Candidate
from data_pipeline.curation.hashing import digest, uniform
from data_pipeline.errors import DataError

MAX_ANSWER_BYTES = 1 << 20
MAX_FAILURES = 32  # without one success: the program or server is at fault, not the samples
_CAPTIONED = ("image_text", "ocr")  # domains whose text is the caption of one image
_SERVER_OPTIONS = ("model", "api_key_variable", "prompt", "max_tokens", "retries")
_RETRIED_STATUSES = (408, 409, 425, 429)  # and all from 500


class RecaptionError(Exception):
    """One sample got no new caption."""


@dataclass
class Recaption:
    """Who writes the captions of which samples. Give `command` or `endpoint`."""

    command: str = ""  # a program and its arguments, run without a shell
    endpoint: str = ""  # of a server, such as http://localhost:8000/v1
    model: str = ""  # its name on the server
    api_key_variable: str = ""  # environment variable with the server's key, if it needs one
    prompt: str = "Describe this image in one paragraph."  # {text} stands for the present caption
    max_tokens: int = 512  # of an answer
    ratio: float = 1.0  # share of samples that are recaptioned
    domains: list[str] = field(default_factory=lambda: ["image_text"])
    concurrency: int = 4  # requests, or programs, at the same time per process
    timeout: float = 120.0  # seconds per answer
    retries: int = 4  # of a request, after 1, 2, 4 ... seconds
    seed: int = 0  # of the choice of samples

    def check(self) -> None:
        """Raise DataError for options that cannot work."""
        if bool(self.command) == bool(self.endpoint):
            raise DataError("recaption: give either `command` or `endpoint`")
        self._check_domains()
        self._check_server()
        try:
            program = shlex.split(self.command)[:1]
        except ValueError as error:
            raise DataError(f"recaption.command cannot be split into words: {error}") from error
        if program and not shutil.which(program[0]):
            raise DataError(f"recaption.command: there is no program {program[0]!r} on the PATH")
        if not 0 <= self.ratio <= 1:
            raise DataError(f"recaption.ratio is {self.ratio}: give a share from 0 to 1")
        if self.concurrency < 1 or self.retries < 0 or self.timeout <= 0:
            raise DataError("recaption: concurrency and timeout must be positive, and retries 0 or more")

    def _check_domains(self) -> None:
        for domain in self.domains:
            if domain not in _CAPTIONED:
                hint = suggestion(domain, _CAPTIONED) or f": use {' or '.join(_CAPTIONED)}"
                raise DataError(f"recaption.domains: {domain!r} is no domain of images with one caption{hint}")

    def _check_server(self) -> None:
        if self.command:
            for option in fields(self):
                if option.name in _SERVER_OPTIONS and getattr(self, option.name) != option.default:
                    raise DataError(
                        f"recaption.{option.name} is for an endpoint: remove it, or make it an argument in `command`"
                    )
            return
        if not self.endpoint.startswith(("http://", "https://")):
            raise DataError(f"recaption.endpoint is {self.endpoint!r}: give a URL, such as http://localhost:8000/v1")
        if not self.model:
            raise DataError("recaption.model is empty: give the model's name on the server")
        if self.api_key_variable and self.api_key_variable not in os.environ:
            raise DataError(f"recaption.api_key_variable: the environment variable {self.api_key_variable} is not set")

    def chosen(self, sample: Candidate) -> bool:
        """Return whether a sample is recaptioned. A hash of its name decides, so other samples have no influence."""
        return (
            sample.domain in self.domains
            and len(sample.images) == 1
            and uniform(self.seed, "recaption", sample.name) < self.ratio
        )


class Recaptioner:
    """Recaptions samples, several at once."""

    def __init__(self, options: Recaption, cache: Path, on_failure: Callable[[str, str], None]) -> None:
        """Start no program or connection yet.

        Args:
            options: The options.
            cache: File of all answers. No other process may write it.
            on_failure: Called with (name, reason) for every chosen sample that keeps its caption.
        """
        self.options, self._on_failure = options, on_failure
        self._closing = ExitStack()
        self._cache = self._closing.enter_context(_Answers(cache))
        self._threads = self._closing.enter_context(ThreadPoolExecutor(options.concurrency))
        self._local = threading.local()
        self._failures, self._answered = 0, False

    def __enter__(self) -> Recaptioner:
        """Return the recaptioner."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop programs and close connections and the cache."""
        self._closing.close()

    def records(self, samples: list[Candidate]) -> list[dict[str, Any]]:
        """Return the records of samples, with new captions for chosen samples that did not fail.

        Raises:
            DataError: The first MAX_FAILURES samples have all failed.
        """
        return list(self._threads.map(self._record, samples))

    def _record(self, sample: Candidate) -> dict[str, Any]:
        if not self.options.chosen(sample):
            return sample.record
        question = digest(self._asking().encode(), sample.images[0], sample.text.encode()).hex()
        answer = self._cache.get(question)
        if answer is None:
            try:
                answer = self._ask(sample)
            except RecaptionError as error:
                self._failures += 1
                if not self._answered and self._failures >= MAX_FAILURES:
                    raise DataError(
                        f"recaption: all requests fail, such as {error}: check that the command or server answers"
                    ) from error
                self._on_failure(sample.name, str(error))
                return sample.record
            self._cache.add(question, answer)
        self._answered = True
        return {**sample.record, "text": answer, "original_text": sample.record.get("text")}

    def _asking(self) -> str:
        """Return what an answer depends on besides the image and the text."""
        options = self.options
        return json.dumps([options.command, options.endpoint, options.model, options.prompt, options.max_tokens])

    def _ask(self, sample: Candidate) -> str:
        if not hasattr(self._local, "captioner"):
            captioner = _Program(self.options) if self.options.command else _Server(self.options)
            self._local.captioner = captioner
            self._closing.callback(captioner.close)
        answer = self._local.captioner.ask(sample)
        if not answer.strip():
            raise RecaptionError("the answer is empty")
        return answer.strip()


class _Program:
    """A command that keeps running. It is started again after it ends or does not answer in time."""

    def __init__(self, options: Recaption) -> None:
        self.options = options
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="recaption-")

    def ask(self, sample: Candidate) -> str:
        image = Path(self._folder.name) / f"image.{_image_format(sample.images[0]).lower()}"
        image.write_bytes(sample.images[0])
        question = {"key": sample.name, "image": str(image), "text": sample.text}
        try:
            line = self._exchange(json.dumps(question).encode() + b"\n")
            answer = json.loads(line)
            if not isinstance(answer, dict) or not isinstance(answer.get("text"), str):
                raise RecaptionError(f"the answer is not a JSON object with a text: {line[:200]!r}")
            return answer["text"]
        except (OSError, ValueError) as error:
            self._end()
            raise RecaptionError(f"the command failed: {error}") from error
        except RecaptionError:
            self._end()  # a late answer would be taken for that of the next question
            raise
        finally:
            image.unlink(missing_ok=True)  # the command may have removed it

    def _exchange(self, question: bytes) -> bytes:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                shlex.split(self.options.command), stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(question)
        self._process.stdin.flush()
        deadline = time.monotonic() + self.options.timeout
        answer = b""
        while not answer.endswith(b"\n"):
            if not is_readable(self._process.stdout.fileno(), deadline - time.monotonic()):
                raise RecaptionError(f"no answer in {self.options.timeout:g} seconds")
            part = os.read(self._process.stdout.fileno(), 1 << 16)
            if not part:
                raise RecaptionError(f"the command ended with status {self._process.wait()}")
            answer += part
            if len(answer) > MAX_ANSWER_BYTES:
                raise RecaptionError(f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
        return answer

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def close(self) -> None:
        self._end()
        self._folder.cleanup()


class _Server:
    """A server with OpenAI's /chat/completions. Requests that may succeed later are repeated."""

    def __init__(self, options: Recaption) -> None:
        self.options = options
        self._session = requests.Session()
        if options.api_key_variable:
            self._session.headers["Authorization"] = f"Bearer {os.environ[options.api_key_variable]}"

    def ask(self, sample: Candidate) -> str:
        data = sample.images[0]
        url = f"data:image/{_image_format(data).lower()};base64,{base64.b64encode(data).decode()}"
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": self.options.prompt.replace("{text}", sample.text)},
        ]
        body = {
            "model": self.options.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.options.max_tokens,
            "temperature": 0,
        }
        for attempt in range(self.options.retries + 1):
            if attempt:
                time.sleep(2 ** (attempt - 1))
            try:
                return self._post(body)
            except _TemporaryFailure as error:
                failure = str(error)
        raise RecaptionError(f"{failure} (requests: {self.options.retries + 1})")

    def _post(self, body: dict[str, Any]) -> str:
        try:
            address = f"{self.options.endpoint.rstrip('/')}/chat/completions"
            response = self._session.post(address, json=body, timeout=self.options.timeout)
        except requests.RequestException as error:
            raise _TemporaryFailure(type(error).__name__) from error
        if response.status_code in _RETRIED_STATUSES or response.status_code >= 500:
            raise _TemporaryFailure(f"status {response.status_code}")
        if response.status_code != 200:
            raise RecaptionError(f"status {response.status_code}: {response.text[:200]}")
        try:
            answer = response.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise RecaptionError(f"not a chat completion: {response.text[:200]!r}") from error
        if not isinstance(answer, str):
            raise RecaptionError(f"the answer is not a text: {answer!r}")
        return answer

    def close(self) -> None:
        self._session.close()


class _TemporaryFailure(Exception):
    """A request failed and may succeed later."""


class _Answers:
    """Answers by question, in a file of JSON lines. A last line that a crash cut off is removed."""

    def __init__(self, path: Path) -> None:
        self._known: dict[str, str] = {}
        if path.is_file():
            complete, newline, _ = path.read_bytes().rpartition(b"\n")
            self._known = dict(json.loads(line) for line in complete.splitlines())
            os.truncate(path, len(complete) + len(newline))
        self._file = open(path, "ab")  # noqa: SIM115 - closed in __exit__
        self._lock = threading.Lock()

    def __enter__(self) -> _Answers:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def get(self, question: str) -> str | None:
        return self._known.get(question)

    def add(self, question: str, answer: str) -> None:
        with self._lock:
            self._known[question] = answer
            self._file.write(json.dumps([question, answer]).encode() + b"\n")
            self._file.flush()


def _image_format(data: bytes) -> str:
    """Return JPEG, PNG ... The images of kept samples can be opened."""
    with Image.open(io.BytesIO(data)) as image:
        return image.format or "JPEG"
