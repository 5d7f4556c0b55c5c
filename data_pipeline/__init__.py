"""From shards on disk to packed training batches: plan first, then fetch.

    inputs --build--> shards + index --plan--> packs --fetch--> Batch

    sample.py     the one Sample type          domains/      records -> Sample
    tokens.py     Sample -> ids and loss       images.py, video.py   bytes -> uint8 patches
    positions.py  3-D rope positions           encode.py     Sample + bytes -> EncodedSample
    shards.py     tar files                    index.py      what the plan may know without decoding
    inputs/       files and folders -> drafts      sharding/     drafts -> shards; foreign shards
    pack.py, plan.py   which sample goes where: a pure function of seed, index, mixture and counters
    fetch.py, batch.py, loader.py   the named samples, decoded and collated, in order
    quarantine.py                   what takes the place of a sample that cannot be used, and when there are too many

Nothing here knows the model, and the model knows nothing of this: they meet in named tensors (`batch.Batch`).
"""
