"""The plan of the data: which sample goes into which pack, as a function of seed, index, mixture and counters.

Its stages are shuffle, blend, pack and balance. They read metadata only, never the shards. Code that reads samples
belongs in `loading`.
"""
