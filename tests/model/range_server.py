"""A web server of a folder that sends parts of files, counts what it sends, and fails as it is told."""

from __future__ import annotations

import threading
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class RangeServer(ThreadingHTTPServer):
    """Serves a folder while it is a context."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.whole: Counter[str] = Counter()  # whole files that were sent, by name
        self.sent: Counter[tuple[str, str]] = Counter()  # bytes of parts, by what follows the `?` and by file name
        self.failures: dict[str, list[str]] = {}  # by file name: how the first requests fail
        self.signature: str | None = None  # must follow the `?` of every request
        self.ranges = True

    def __enter__(self) -> RangeServer:
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of clients that stop reading."""


class Handler(SimpleHTTPRequestHandler):
    """Answers a request."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, RangeServer)
        address, _, query = self.path.partition("?")
        file = Path(self.translate_path(address))
        failures = server.failures.get(file.name, [])
        failure = failures.pop(0) if failures else ""
        if server.signature is not None and query != server.signature:
            self.send_error(403)
        elif failure.isdecimal():
            self.send_error(int(failure))
        elif not file.is_file():
            self.send_error(404)
        else:
            self._send(server, file, query, cut=failure == "cut")

    def _send(self, server: RangeServer, file: Path, query: str, *, cut: bool) -> None:
        stat, content = file.stat(), file.read_bytes()
        part = self.headers.get("Range") if server.ranges else None
        if part is not None:
            first, last = (int(number) for number in part.removeprefix("bytes=").split("-"))
            if last >= len(content):
                self.send_error(416)
                return
            size, content = len(content), content[first : last + 1]
            server.sent[query, file.name] += len(content)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        else:
            server.whole[file.name] += 1
            self.send_response(200)
        self.send_header("ETag", f'"{stat.st_mtime_ns:x}-{stat.st_size:x}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = cut

    def log_message(self, format: str, *arguments: object) -> None:
        pass
