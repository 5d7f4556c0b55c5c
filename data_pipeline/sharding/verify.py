"""Shards read back: against their manifest, their indexes, and by decoding every picture and clip.

| reason | what is found |
|---|---|
| `missing_shard`, `extra_shard` | the manifest names a shard that is not there, or does not know one that is |
| `wrong_catalogue` | the catalogue speaks of another tar than the one that is there: training would go by it |
| `wrong_checksum` | a shard's bytes are not those that were written |
| `unusable_index`, `wrong_index` | a shard's index is missing, damaged or of another tar; or says what is not so |
| `checksum`, `unreadable_image`, `media_mismatch` ... | one sample cannot be used: see errors.BadSample |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.encoding.tokenizer import GlmTokenizer
from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.draft import Rejected
from data_pipeline.sharding.build import read_manifest
from data_pipeline.sharding.executors import EXECUTORS
from data_pipeline.sharding.measure import measure
from data_pipeline.sharding.writing import Counts, file_sha256, load_tokenizer
from data_pipeline.shards.catalogue import find_shards, read_catalogue
from data_pipeline.shards.index import CATALOGUE, ShardIndex, read_index
from data_pipeline.shards.members import index_command
from data_pipeline.shards.reader import ShardReader
from data_pipeline.shards.tar import fingerprint


@dataclass
class Verified:
    """What was found: samples that can be used, and all that cannot."""

    counts: Counts = field(default_factory=Counts)
    rejected: list[Rejected] = field(default_factory=list)

    def reject(self, origin: str, error: BadSample) -> None:
        self.counts.rejected[error.reason] += 1
        self.rejected.append(Rejected(origin, error.reason, error.detail))


@dataclass(frozen=True)
class VerifyJob:
    """One shard to verify. sha256: what the manifest says of it; empty: nothing. tokenizer: its folder or empty."""

    shard: Path
    sha256: str
    tokenizer: str

    def __str__(self) -> str:
        return str(self.shard)


def jobs_of(paths: Sequence[str], tokenizer: str) -> tuple[list[VerifyJob], Verified]:
    """The shards that paths stand for, and those on which manifests and folders do not agree. Raises DataError."""
    load_tokenizer(tokenizer)  # a mistake in its path is found here and not by every worker
    jobs: list[VerifyJob] = []
    wrong = Verified()
    for path in paths:
        manifest = read_manifest(Path(path)) if Path(path).is_dir() else None
        written = {shard["file"]: shard["sha256"] for shard in manifest["shards"]} if manifest else {}
        shards = {} if manifest and not written else {shard.name: shard for shard in find_shards(path)}
        present = [shard for _, shard in sorted(shards.items()) if shard.is_file()]
        for name, error in _wrong_in_catalogue(present) if present else ():
            wrong.reject(name, error)
        for name in sorted(shards.keys() | written):
            if name not in shards or not shards[name].is_file():
                wrong.reject(name, BadSample("missing_shard", f"it belongs to {path} but is not there: restore it"))
                continue
            if manifest and name not in written:
                wrong.reject(name, BadSample("extra_shard", f"the manifest of {path} does not know it: remove it"))
            jobs.append(VerifyJob(shards[name], written.get(name, ""), tokenizer))
    return jobs, wrong


def _wrong_in_catalogue(shards: Sequence[Path]) -> Iterator[tuple[str, BadSample]]:
    """The shards, all of one folder, that its catalogue does not know as they are; the catalogue if it is damaged."""
    folder = shards[0].parent
    mend = f"run {index_command(folder)}"
    if not (folder / CATALOGUE).is_file():
        return
    try:
        entries, _ = read_catalogue(folder / CATALOGUE, mend)
    except DataError as error:
        yield CATALOGUE, BadSample("wrong_catalogue", str(error))
        return
    listed = {entry.name: entry.header.tar_fingerprint for entry in entries}
    for shard in shards:
        if shard.name in listed and listed[shard.name] != fingerprint(shard):
            yield shard.name, BadSample("wrong_catalogue", f"it is another tar than {CATALOGUE} says: {mend}")


def verify_shards(jobs: Sequence[VerifyJob], *, executor: str = "here", workers: int = 1) -> Iterator[Verified]:
    """What is found in each shard, as it is found."""
    yield from EXECUTORS[executor](verify_shard, jobs, workers=workers)


def verify_shard(job: VerifyJob) -> Verified:
    """Reads one shard back: its checksum, and every indexed sample (encoded, with a tokenizer)."""
    found = Verified()
    name = job.shard.name
    if job.sha256 and file_sha256(job.shard) != job.sha256:
        found.reject(name, BadSample("wrong_checksum", "its bytes are not those that were written: copy it again"))
    try:
        index = read_index(job.shard)
    except DataError as error:
        found.reject(name, BadSample("unusable_index", str(error)))
        return found
    reader = ShardReader()
    for row in range(index.table.num_rows):
        try:
            domain = _read_back(index, row, reader, load_tokenizer(job.tokenizer))
        except BadSample as error:
            found.reject(f"{name}/{index.sample(row).key}", error)
        else:
            found.counts.domains[domain] += 1
            found.counts.samples += 1
    reader.close()
    found.counts.shards.append({"file": name, "samples": index.table.num_rows, "bytes": job.shard.stat().st_size})
    return found


def _read_back(index: ShardIndex, row: int, reader: ShardReader, tokenizer: GlmTokenizer | None) -> str:
    """The domain of a sample that can be used whole, and is what the index says of it. Raises BadSample."""
    sample = index.sample(row)
    raw = reader.read(str(index.file), sample, index.header.tar_fingerprint)
    measured = measure(raw, tokenizer, index.header.chat_form, whole=True).index_row(sample)
    indexed = index.table.slice(row, 1).to_pylist()[0]
    same_tokenizer = tokenizer is not None and tokenizer.hash == index.header.tokenizer_hash
    for column in ("domain", "images", "videos", *(("text_tokens", "blocks") if same_tokenizer else ())):
        if measured[column] != indexed[column]:
            raise BadSample("wrong_index", f"{column} of it are {measured[column]}, the index says {indexed[column]}")
    return measured["domain"]
