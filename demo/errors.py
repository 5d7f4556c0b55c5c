"""The error of the demo."""

from __future__ import annotations


class DemoError(ValueError):
    """The demo cannot be built or run; the message says what failed and how to fix it."""
