"""Selection of samples worth training on: a list of filters, each of which keeps a sample or gives a reason.

recipe.py      the list, as YAML               filters.py     what a filter is
candidate.py   a sample as filters see it      run.py         shards and a recipe -> shards and a report

examine.py     pass 1: each shard alone, in any process
decide.py      pass 2: one process, filter by filter, over small features
kept.py        pass 3: the samples that stay, as an input of a build; recaption.py: new captions for them
report.py      the report as a table, as JSON and as a chart

Filters of single samples: images.py, videos.py (thumbnails.py), texts.py, structure.py, relevance.py, contamination.py.
Filters that compare samples: duplicates.py (buckets.py), concepts.py.
"""
