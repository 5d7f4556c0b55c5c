"""From a user's files to packed training batches: plan first, then fetch.

    inputs -> drafts -> shards + index -> plan -> packs -> fetch -> Batch

    config.py    the `data.*` keys of a run
    errors.py    DataError, BadSample, and the record of a sample that was not used
    sample.py    the one Sample type of all domains
    domains/     records (KEY.json) -> Sample: captions, documents, chats
    inputs/      a user's files and folders -> drafts of records, by input kind
    sharding/    drafts -> shards, in many processes; indexes of shards that other programs made
    curation/    shards -> the samples of them that pass a recipe of filters
    shards/      tar files, their indexes and catalogues, shards behind a URL
    plan/        which sample goes where: a pure function of seed, index, mixture and step
    loading/     the samples that the plan names: read, decoded, collated, quarantined if bad; data workers
    media/       images and videos -> uint8 patches; boxes; the pixel budgets
    encoding/    Sample -> tokens, rope positions, EncodedSample; several of them -> Batch

The data pipeline knows nothing of the model, and the model nothing of it: they meet in the tensors of
`encoding.batch.Batch`.
"""
