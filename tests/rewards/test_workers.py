"""Symbolic mathematics in processes that can be killed, against integrals and sums that are known."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from rewards.workers import Limits, Workers, shared
from tests.rewards.judging import score

TOWER = "9^{9^{9^{9}}}"


def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds: the kernel frees the memory of a killed process first."""
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    made = Workers(1, Limits(seconds=3))
    made.start()
    yield made
    made.close()


@pytest.mark.parametrize(
    ("given", "wanted", "said"),
    [
        ("\\int_0^1 x^2 dx", "\\frac{1}{3}", "same"),
        ("\\int_0^1 x^2 dx", "\\frac{1}{2}", "different"),
        ("\\sum_{k=1}^{n} k", "\\frac{n(n+1)}{2}", "same"),
        ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{bmatrix}1&2\\\\3&4\\end{bmatrix}", "same"),
        ("\\begin{pmatrix}1&2\\\\3&5\\end{pmatrix}", "\\begin{bmatrix}1&2\\\\3&4\\end{bmatrix}", "different"),
        ("", "3", "unreadable"),
    ],
)
def test_comparison(workers: Workers, given: str, wanted: str, said: str) -> None:
    assert workers.compare(given, wanted) == said


def test_what_does_not_end_is_killed_and_the_next_comparison_works() -> None:
    others = {*psutil.Process().children(recursive=True)}

    def ours() -> set[psutil.Process]:
        return {*psutil.Process().children(recursive=True)} - others

    quick = Workers(1, Limits(seconds=1))
    assert quick.compare("\\frac{1}{2}", "0.5") == "same"  # the server has started
    until(lambda: len(ours()) == 1)
    server = ours()
    begun = time.monotonic()
    assert quick.compare(TOWER, "3") in ("time_limit", "memory_limit")
    assert time.monotonic() - begun < 3
    assert quick.killed == 1
    until(lambda: ours() == server)  # no process is left behind, and the server is the same
    assert quick.compare("\\frac{1}{2}", "0.5") == "same"
    quick.close()
    until(lambda: not ours())


def test_a_server_that_cannot_be_replaced_is_started_by_the_next_comparison() -> None:
    """The cause is a real one: the process may open no more files when its server has died."""
    others = {*psutil.Process().children()}
    workers = Workers(1, Limits(seconds=20))
    assert workers.compare("\\frac{1}{2}", "0.5") == "same"
    [server] = {*psutil.Process().children()} - others
    server.kill()
    server.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open("/dev/null", os.O_RDONLY)  # all numbers below the limit are taken
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            workers.compare("\\frac{1}{2}", "0.5")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(lowest)
    said: list[str] = []
    thread = threading.Thread(target=lambda: said.append(workers.compare("\\frac{1}{2}", "0.5")), daemon=True)
    thread.start()
    thread.join(60)
    assert said == ["same"]  # without a place for a server it would wait for ever
    workers.close()


def test_what_takes_much_memory_is_killed() -> None:
    small = Workers(1, Limits(seconds=20, memory=1 << 20))
    assert small.compare("10^{10^7}", "3") == "memory_limit"
    assert small.killed == 1
    small.close()


def test_threads_share_workers(workers: Workers) -> None:
    said: list[str] = []
    threads = [
        threading.Thread(target=lambda n=n: said.append(workers.compare(f"\\int_0^{n} 1 dx", str(n))))
        for n in range(1, 7)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == ["same"] * 6


def test_verifier_asks_the_workers() -> None:
    assert score("math", "\\int_0^1 x^2 dx", "1/3") == 1
    assert score("math", "\\int_0^1 x^3 dx", "1/3") == 0


def test_fork_has_workers_of_its_own() -> None:
    assert score("math", "\\int_0^1 x^2 dx", "1/3") == 1
    child = os.fork()
    if not child:
        same = score("math", "\\int_0^1 x^4 dx", "1/5") == 1
        shared().close()
        os._exit(0 if same else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert score("math", "\\int_0^1 x^3 dx", "1/4") == 1  # the fork has not ended our server
