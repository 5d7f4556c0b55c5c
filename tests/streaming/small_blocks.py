"""tools.convert with blocks of 1 MiB, so that a small model has many portions."""

from __future__ import annotations

import streaming.limits
from tools.convert import app
from tools.errors import run

if __name__ == "__main__":
    streaming.limits.LARGEST_BLOCK = streaming.limits.SMALLEST_BLOCK
    run(app)
