"""Comparisons with other tools, run with `python -m benchmarks.NAME`. No product code imports this package."""
