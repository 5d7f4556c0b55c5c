"""Loads weights into a server, and notices one that hangs meanwhile: loading itself may take long."""

from __future__ import annotations

import threading
from pathlib import Path

from rl.engines.server import Server, ServerGone


def load_watched(server: Server, folder: Path, version: str, seconds: float, health_seconds: float) -> None:
    """Let a server load weights, as Server.load, as long as it answers /health, if it can meanwhile.

    Args:
        server: The server.
        folder: The weights.
        version: What the server calls them.
        seconds: How long it may take.
        health_seconds: In which /health must answer.

    Raises:
        ServerGone, RequestFailed: It did not load them. It may still do what it was asked last.
    """
    if not server.answers_while_loading:
        server.load(folder, version, seconds)
        return
    ended = threading.Event()
    errors: list[Exception] = []

    def load() -> None:
        try:
            server.load(folder, version, seconds)
        except Exception as error:  # raised by the thread that waits
            errors.append(error)
        ended.set()

    threading.Thread(target=load, daemon=True).start()
    while not ended.wait(health_seconds / 3):
        if not server.is_healthy(health_seconds) and not ended.is_set():
            raise ServerGone(f"no answer to /health within {health_seconds:g} s while it loads weights")
    if errors:
        raise errors[0]
