"""The plan of the data: which sample goes into which pack, as a function of seed, index, mixture and counters.

Sources are shuffled, blended, packed and balanced. Only metadata is read, never the shards: code that reads samples
belongs in `loading`.
"""
