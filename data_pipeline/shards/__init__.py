"""Shards on disk: the tar format, members and keys, writing, scanning, random reads, indexes and catalogues, URLs."""
