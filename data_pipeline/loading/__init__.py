"""From a plan to batches: sources, the loader and its workers, and what replaces a sample that cannot be used.

Code that decides which sample goes where belongs in `plan`; code that reads one shard belongs in `shards`.
"""
