"""A Hugging Face Hub on this machine: the paths of its API that huggingface_hub asks for, and the errors it sends.

As on the Hub, files of weights are redirected to another origin with a signature, which gets no token, and small files
are sent by the Hub itself.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

REPOSITORY = "zai-org/tiny"
GATED = "zai-org/gated"
REVISION = "main"
FORBIDDEN = "hf_forbidden_token"
SIGNATURE = "c2lnbmVk%2FYnVja2V0"


class HubServer(ThreadingHTTPServer):
    """Serves a folder as hf://zai-org/tiny while it is a context, to clients with a token of it."""

    protocol = "hf"
    missing = "hf://zai-org/none"

    def __init__(self, folder: Path, clients: Iterable[str]) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler))
        self.folder = folder
        self.url = f"hf://{REPOSITORY}"
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.storage = f"http://localhost:{self.server_address[1]}"  # another origin
        self.tokens = {f"hf_{hashlib.sha256(client.encode()).hexdigest()[:34]}": client for client in clients}
        self.sent: Counter[tuple[str, str]] = Counter()  # bytes of weights, by client and file name
        self.failures: dict[str, list[str]] = {}  # by file name: how the first requests of its content fail
        self.leaked: list[str] = []  # headers with a token that came to the other origin

    def __enter__(self) -> HubServer:
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of clients that stop reading."""

    def environment(self, client: str) -> dict[str, str]:
        """Return how a client finds and signs in to the service. `stranger` has a token that is not known."""
        known = {name: token for token, name in self.tokens.items()} | {"forbidden": FORBIDDEN}
        return {**self.anonymous(), "HF_TOKEN": known.get(client, "hf_stranger_token")}

    def anonymous(self) -> dict[str, str]:
        """Return the environment of a client without a token."""
        return {"HF_ENDPOINT": self.address, "HF_TOKEN_PATH": "/nonexistent", "HF_TOKEN": ""}

    def secrets(self) -> list[str]:
        """Return what may appear in no message."""
        return [*self.tokens, FORBIDDEN, "hf_stranger_token", SIGNATURE, unquote(SIGNATURE)]

    def replace(self, name: str, content: bytes) -> None:
        """Write another version of a file."""
        (self.folder / name).write_bytes(content)

    def remove(self, name: str) -> None:
        """Remove a file."""
        (self.folder / name).unlink()


class Handler(BaseHTTPRequestHandler):
    """Answers a request."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: HubServer

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self._form = parse_qs(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode())
        self.do_GET()

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        if self.headers.get("Host", "").startswith("localhost"):
            self._stored(unquote(address.path), parse_qs(address.query))
            return
        parts = [unquote(part) for part in address.path.strip("/").split("/")]
        is_api = parts[:2] == ["api", "models"]
        parts = parts[2:] if is_api else parts
        if self._may_read("/".join(parts[:2])):
            (self._api if is_api else self._resolve)(parts[2:])

    def _may_read(self, repository: str) -> bool:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token == FORBIDDEN:
            self._refuse(403, "", "Your token has no access to this repository.")
        elif token and token not in self.server.tokens:
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif repository == GATED:
            self._refuse(403, "GatedRepo", f"Access to model {GATED} is restricted.")
        elif not token:
            self._refuse(401, "RepoNotFound", "Invalid username or password.")
        elif repository != REPOSITORY:
            self._refuse(404, "RepoNotFound", "Repository not found")
        else:
            return True
        return False

    # --- the API ------------------------------------------------------------------------------------------------------

    def _api(self, parts: list[str]) -> None:
        kind, revision, path = ([*parts, "", "", ""])[:3]
        if kind in ("", "revision"):
            revision = revision or REVISION
        if revision != REVISION:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif kind in ("", "revision"):
            self._json({"_id": "1", "id": REPOSITORY, "modelId": REPOSITORY, "sha": "0" * 40, "siblings": []})
        elif kind == "tree" and path:
            self._refuse(404, "EntryNotFound", f"{path} does not exist on {REVISION}")
        elif kind == "tree":
            self._json([self._entry(file) for file in sorted(self.server.folder.iterdir())])
        elif kind == "paths-info":
            files = [self.server.folder / path for path in self._form["paths"]]
            self._json([self._entry(file) for file in files if file.is_file()])
        else:
            self._refuse(404, "", "Sorry, we can't find the page you are looking for.")

    def _entry(self, file: Path) -> dict[str, Any]:
        content = file.read_bytes()
        blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        entry = {"type": "file", "oid": blob, "size": len(content), "path": file.name}
        if file.suffix == ".safetensors":
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return entry

    # --- files --------------------------------------------------------------------------------------------------------

    def _resolve(self, parts: list[str]) -> None:
        name = parts[-1]
        file = self.server.folder / name
        if parts[0] != "resolve" or parts[1] != REVISION:
            self._refuse(404, "RevisionNotFound", "Invalid rev id")
        elif not file.is_file():
            self._refuse(404, "EntryNotFound", "Entry not found")
        elif file.suffix == ".safetensors":
            client = self.server.tokens[self.headers["Authorization"].removeprefix("Bearer ")]
            self.send_response(302)
            self.send_header("Location", f"{self.server.storage}/{quote(name)}?client={client}&Signature={SIGNATURE}")
            self.send_header("X-Linked-Size", str(file.stat().st_size))
            self.send_header("X-Linked-ETag", f'"{hashlib.sha256(file.read_bytes()).hexdigest()}"')
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._content(file, "", cut=False)

    def _stored(self, path: str, query: dict[str, list[str]]) -> None:
        file = self.server.folder / path.lstrip("/")
        if "Authorization" in self.headers:
            self.server.leaked.append(self.headers["Authorization"])
        failures = self.server.failures.get(file.name, [])
        failure = failures.pop(0) if failures else ""
        if query.get("Signature") != [unquote(SIGNATURE)]:
            self._refuse(403, "", "SignatureDoesNotMatch")
        elif failure.isdecimal():
            self._refuse(int(failure), "", "")
        elif not file.is_file():
            self._refuse(404, "", "NoSuchKey")
        else:
            self._content(file, query["client"][0], cut=failure == "cut")

    def _content(self, file: Path, client: str, *, cut: bool) -> None:
        content = file.read_bytes()
        part, size = self.headers.get("Range"), len(content)
        self.send_response(206 if part else 200)
        if part:
            first, last = (int(number) for number in part.removeprefix("bytes=").split("-"))
            content = content[first : last + 1]
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            sent = content[: len(content) // 2] if cut else content
            if client:
                self.server.sent[client, file.name] += len(sent)
            self.wfile.write(sent)
            self.close_connection = cut

    def _json(self, answer: Any) -> None:
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _refuse(self, status: int, code: str, text: str) -> None:
        content = json.dumps({"error": text}).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        if text:
            self.send_header("X-Error-Message", text)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        pass
