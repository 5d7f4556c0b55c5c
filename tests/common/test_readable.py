"""Waiting for input, also in a process with many open files."""

from __future__ import annotations

import os
import resource
import time

import pytest

from common.readable import is_readable

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("open_files", [0, 1100])
def test_input_is_seen_and_waited_for(open_files: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    null = os.open(os.devnull, os.O_RDONLY)
    held = [os.dup(null) for _ in range(open_files)]
    reading, writing = os.pipe()
    try:
        assert reading > open_files
        started = time.monotonic()
        assert not is_readable(reading, 0.05)
        assert time.monotonic() - started >= 0.04
        assert not is_readable(reading, -1)
        os.write(writing, b"x")
        assert is_readable(reading, 10)
    finally:
        for descriptor in (reading, writing, null, *held):
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
