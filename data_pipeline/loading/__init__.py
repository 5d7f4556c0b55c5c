"""From a plan to batches: the sources, the loader and its worker processes, and what replaces a sample that cannot be used."""
