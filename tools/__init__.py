"""Command lines. Nothing imports this package; run its modules with ``python -m tools.NAME`` from the repository root."""
