"""Memory that a worker has freed is used again: the kernel counts the pages that it has to provide."""

from __future__ import annotations

import subprocess
import sys

import pytest

PAGES = """
import resource
import numpy as np
from common.malloc import keep_freed_memory
if {kept}:
    keep_freed_memory()
def image():  # four buffers of 5 MB, as decoded, resized and cut into patches
    return [np.ones(5_000_000, dtype=np.uint8) for _ in range(4)]
image()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    image()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.fast
def test_memory_of_one_image_is_used_for_the_next():
    def faults(kept: bool) -> int:
        script = [sys.executable, "-c", PAGES.format(kept=kept)]
        return int(subprocess.run(script, capture_output=True, text=True, check=True).stdout)

    assert faults(kept=True) < 1000
    assert faults(kept=False) > 20_000  # otherwise keep_freed_memory would be useless
