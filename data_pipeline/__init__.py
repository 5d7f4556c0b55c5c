"""From shards on disk to packed training batches: plan first, then fetch.

    inputs --build--> shards + index --plan--> packs --fetch--> Batch

    inputs/                 files and folders -> drafts
    sample.py, domains/     the one Sample type, and records -> Sample
    sharding/               drafts -> shards, by many processes; the indexes of shards that others made
    curation/               shards -> those of their samples that pass a list of filters
    tar.py, shards.py       the tar format; samples written to tars and read at random
    remote.py               shards that are URLs
    index.py, catalogue.py  what the plan may know without opening a tar: of a shard, of a folder of shards
    source.py               all shards of a source as one table
    shuffle.py, draw.py, pack.py, cost.py, balance.py, plan.py
                            which sample goes where: a pure function of seed, index, mixture and counters
    tokens.py, positions.py Sample -> ids and loss, 3-D rope positions
    images.py, sizes.py     pictures -> uint8 patches; how many
    video.py, frames.py     clips -> uint8 patches; the frames that are looked at, decoded
    encode.py, batch.py     Sample + bytes -> EncodedSample; several of them -> Batch
    files.py                files that are whole or not there
    fetch.py, loader.py     the named samples, decoded and collated, in order
    workers.py              the processes that do it, and what is said when one dies
    memory.py               what a data worker frees stays with it
    mixture.py              what a plan takes from every domain
    quarantine.py           what takes the place of a sample that cannot be used, and when there are too many

Nothing here knows the model, and the model knows nothing of this: they meet in named tensors (`batch.Batch`).
"""
