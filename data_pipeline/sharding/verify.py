"""Read shards back: compare them with their manifest and indexes, and decode every image and video.

| reason | what is found |
|---|---|
| `missing_shard`, `extra_shard` | the manifest lists a shard that is missing, or does not list one that exists |
| `wrong_catalogue` | the catalogue describes another tar than the one in the folder; training would use the catalogue |
| `wrong_checksum` | a shard's bytes are not those that were written |
| `unusable_index`, `wrong_index` | a shard's index is missing, damaged or of another tar, or its content is wrong |
| `unusable_facts`, `wrong_facts` | the same of the facts of its prompts, or of their grades (shards/prompt_facts.py) |
| `checksum`, `unreadable_image`, `media_mismatch` ... | one sample cannot be used: see errors.BadSample |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.encoding.generations import generation_of_hash
from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.draft import Rejected
from data_pipeline.sharding.build import read_manifest
from data_pipeline.sharding.executors import EXECUTORS
from data_pipeline.sharding.measure import measure
from data_pipeline.sharding.tasks import PromptCheck
from data_pipeline.sharding.writing import Counts, file_sha256, load_tokenizer
from data_pipeline.shards.catalogue import find_shards, read_catalogue
from data_pipeline.shards.index import CATALOGUE, ShardIndex, read_index
from data_pipeline.shards.members import index_command
from data_pipeline.shards.prompt_facts import FactsRow, facts_path, read_facts, read_grades
from data_pipeline.shards.reader import ShardReader
from data_pipeline.shards.tar import fingerprint


@dataclass
class Verified:
    """The result of verifying a shard or a folder."""

    counts: Counts = field(default_factory=Counts)  # of samples that can be used, and of problems by reason
    rejected: list[Rejected] = field(default_factory=list)

    def reject(self, origin: str, error: BadSample) -> None:
        """Add a problem."""
        self.counts.rejected[error.reason] += 1
        self.rejected.append(Rejected(origin, error.reason, error.detail))


@dataclass(frozen=True)
class VerifyJob:
    """One shard to verify."""

    shard: Path
    sha256: str  # from the manifest; empty if there is none
    tokenizer: str  # its folder, or empty
    check_prompt: PromptCheck | None = None  # as in BuildOptions

    def __str__(self) -> str:
        return str(self.shard)


def jobs_of(
    paths: Sequence[str], tokenizer: str, check_prompt: PromptCheck | None = None
) -> tuple[list[VerifyJob], Verified]:
    """Return the shards to verify, and the problems that manifests, catalogues and folders alone show.

    Raises:
        DataError: a path stands for nothing, or a manifest is damaged.
    """
    load_tokenizer(tokenizer)  # so that a wrong path is one error, not one per worker
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
                wrong.reject(name, BadSample("missing_shard", f"it belongs to {path} but is missing: restore it"))
                continue
            if manifest and name not in written:
                wrong.reject(name, BadSample("extra_shard", f"the manifest of {path} does not list it: remove it"))
            jobs.append(VerifyJob(shards[name], written.get(name, ""), tokenizer, check_prompt))
    return jobs, wrong


def _wrong_in_catalogue(shards: Sequence[Path]) -> Iterator[tuple[str, BadSample]]:
    """Yield the shards of one folder that its catalogue describes wrongly, or the catalogue if it is damaged."""
    folder = shards[0].parent
    fix = f"run {index_command(folder)}"
    if not (folder / CATALOGUE).is_file():
        return
    try:
        entries, _ = read_catalogue(folder / CATALOGUE, fix)
    except DataError as error:
        yield CATALOGUE, BadSample("wrong_catalogue", str(error))
        return
    listed = {entry.name: entry.header.tar_fingerprint for entry in entries}
    for shard in shards:
        if shard.name in listed and listed[shard.name] != fingerprint(shard):
            yield shard.name, BadSample("wrong_catalogue", f"it is another tar than {CATALOGUE} says: {fix}")


def verify_shards(jobs: Sequence[VerifyJob], *, executor: str = "here", workers: int = 1) -> Iterator[Verified]:
    """Yield the result for each shard, in any order."""
    yield from EXECUTORS[executor](verify_shard, jobs, workers=workers)


def verify_shard(job: VerifyJob) -> Verified:
    """Verify one shard: its checksum, and every indexed sample (encoded too if there is a tokenizer)."""
    found = Verified()
    name = job.shard.name
    if job.sha256 and file_sha256(job.shard) != job.sha256:
        found.reject(name, BadSample("wrong_checksum", "its bytes have changed since it was written: copy it again"))
    try:
        index = read_index(job.shard)
    except DataError as error:
        found.reject(name, BadSample("unusable_index", str(error)))
        return found
    facts: dict[str, FactsRow] = {}
    try:
        rows = read_facts(job.shard, index.table, index.header.tar_fingerprint).to_pylist()
        facts = {row["key"]: row for row in rows}
        read_grades(job.shard, index.header.tar_fingerprint)
    except DataError as error:
        found.reject(name, BadSample("unusable_facts", str(error)))
    reader = ShardReader()
    for row in range(index.table.num_rows):
        try:
            domain = _read_back(job, index, row, reader, facts)
        except BadSample as error:
            found.reject(f"{name}/{index.sample(row).key}", error)
        else:
            found.counts.domains[domain] += 1
            found.counts.samples += 1
    reader.close()
    found.counts.shards.append({"file": name, "samples": index.table.num_rows, "bytes": job.shard.stat().st_size})
    return found


def _read_back(job: VerifyJob, index: ShardIndex, row: int, reader: ShardReader, facts: dict[str, FactsRow]) -> str:
    """Return the domain of a sample that decodes completely and equals its index row. Raises BadSample."""
    sample, tokenizer = index.sample(row), load_tokenizer(job.tokenizer)
    raw = reader.read(str(index.file), sample, index.header.tar_fingerprint)
    form = generation_of_hash(index.header.tokenizer_hash).video
    found = measure(raw, tokenizer, index.header.chat_form, whole=True, video_form=form)
    measured = found.index_row(sample)
    indexed = index.table.slice(row, 1).to_pylist()[0]
    same_tokenizer = tokenizer is not None and tokenizer.hash == index.header.tokenizer_hash
    for column in ("domain", "images", "videos", *(("text_tokens", "blocks") if same_tokenizer else ())):
        if measured[column] != indexed[column]:
            raise BadSample("wrong_index", f"its {column} are {measured[column]}, the index says {indexed[column]}")
    for said in found.facts_rows(sample):
        if facts.get(sample.key, said) != said:
            raise BadSample("wrong_facts", f"its facts are {said}, but {facts_path(job.shard).name} has others")
    if found.prompt and job.check_prompt:
        job.check_prompt(found.prompt)
    return found.domain
