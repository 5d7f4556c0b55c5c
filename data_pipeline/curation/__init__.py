"""Which samples are worth training on: a visible list of filters, each answering keep or a counted reason.

recipe.py      the list, as YAML           filters.py     what a filter is
candidate.py   a sample as filters see it  run.py         shards and a recipe -> shards, and an account

examine.py     pass 1: every shard alone, in any process
decide.py      pass 2: one process, filter by filter, over small features
kept.py        pass 3: what stays, as an input of sharding; recaption.py: captions written anew on the way
report.py      the account as a table, as numbers and as a picture

pictures.py, texts.py, structure.py, clips.py (thumbnails.py), relevance.py, contamination.py    one sample at a time
duplicates.py (buckets.py), concepts.py                                                         all samples together
"""
