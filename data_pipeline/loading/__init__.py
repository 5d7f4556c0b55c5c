"""From a plan to batches: sources, the loader and its workers, and what replaces a sample that cannot be used."""
