"""Comparisons with what others do. Nothing imports this package; run its modules with `python -m benchmarks.NAME`."""
