"""Write indexes for webdataset shards that another program made, in parallel and shard by shard.

A sample that cannot be used is not indexed: it is counted by reason and listed in rejected.jsonl beside the shards,
with the origin "theirs.tar/KEY". A shard is not read again if its index is of the same tar, tokenizer and chat form.

    theirs.tar                            the input
    .build/theirs.tar.rejected.jsonl      its rejected samples, until all shards are done
    theirs.index.arrow                    renamed last: without it the shard is not done
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import replacing, write_text
from data_pipeline.errors import REJECTED, BadSample, DataError
from data_pipeline.sharding.executors import EXECUTORS
from data_pipeline.sharding.fields import unused_fields, unused_message_keys
from data_pipeline.sharding.measure import measure
from data_pipeline.sharding.tasks import PromptCheck, check_chat_form
from data_pipeline.sharding.writing import WORK, Counts, chat_form_of, load_tokenizer, write_rejected
from data_pipeline.shards.catalogue import write_catalogue
from data_pipeline.shards.index import IndexHeader, read_index, write_index
from data_pipeline.shards.members import ShardSample
from data_pipeline.shards.prompt_facts import FactsRow, read_facts, write_facts
from data_pipeline.shards.reader import ShardReader
from data_pipeline.shards.scan import Scan, count_members, scan_shard
from data_pipeline.shards.tar import fingerprint


@dataclass(frozen=True)
class IndexJob:
    """One shard to index."""

    shard: Path
    tokenizer: str
    chat_form: str
    check_prompt: PromptCheck | None = None

    def __str__(self) -> str:
        return str(self.shard)


def index_shards(
    shards: Sequence[Path],
    *,
    tokenizer: str | Path = "",
    chat_form: str = "",
    executor: str = "here",
    workers: int = 1,
    check_prompt: PromptCheck | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Counts:
    """Write the index of every given shard, and the catalogue of every folder. Of media, only headers are read.

    Args:
        shards: The tars.
        tokenizer: Its folder; empty: text tokens are not counted.
        chat_form: How chats are written; empty: as the models of the tokenizer write them.
        executor: One of EXECUTORS.
        workers: The number of processes.
        check_prompt: As in BuildOptions.
        tick: Called after each shard.

    Raises:
        DataError: an option is wrong, or a worker died.
    """
    check_chat_form(chat_form)
    chat_form = chat_form_of(chat_form, load_tokenizer(str(tokenizer)))
    for folder in {shard.parent for shard in shards}:
        (folder / WORK).mkdir(exist_ok=True)
    jobs = [IndexJob(shard, str(tokenizer), chat_form, check_prompt) for shard in shards]
    total = Counts()
    for read in EXECUTORS[executor](index_shard, jobs, workers=workers):
        total.add(read)
        tick()
    for folder in sorted({shard.parent for shard in shards}):
        names = {shard.name: None for shard in shards if shard.parent == folder}  # a set in the order of the shards
        total.rejected += _merge_rejected(folder, names)
        write_catalogue(folder)
    for shard in shards:
        domains = Counter(read_index(shard).table.column("domain").to_pylist())
        total.domains += domains
        total.samples += domains.total()
        total.shards.append({"file": shard.name, "samples": domains.total(), "bytes": shard.stat().st_size})
    return total


def index_shard(job: IndexJob) -> Counts:
    """Write the index of one shard, unless it has one for this tar, tokenizer and chat form.

    Returns:
        What became of its members. Nothing for a shard that is not read again.
    """
    tokenizer, counts = load_tokenizer(job.tokenizer), Counts()
    wanted = IndexHeader(fingerprint(job.shard), tokenizer.hash if tokenizer else "", job.chat_form)
    try:
        index = read_index(job.shard)
        read_facts(job.shard, index.table, index.header.tar_fingerprint)
        if index.header == wanted:
            return counts
    except DataError:  # there is none, or it is damaged
        pass
    rows: list[dict[str, Any]] = []
    facts: list[FactsRow] = []
    part = _rejected_part(job.shard.parent, job.shard.name)
    reader = ShardReader()
    scan = _scan(job.shard)
    counts.accounts.give({"members": count_members(job.shard)})
    counts.not_read = scan.not_read
    counts.accounts.use({"members": scan.not_read.total()}, "not_read")
    counts.accounts.use({"members": scan.rejected_members.total()}, "rejected")
    with replacing(part) as temporary, open(temporary, "w", encoding="utf-8") as rejections:
        for key, error in scan.rejected:
            write_rejected(rejections, error.reason, f"{job.shard.name}/{key}".rstrip("/"), error.detail)
        for sample in scan.samples:
            try:
                _check_media(scan, sample)
                raw = reader.read(str(job.shard), sample)
                measured = measure(raw, tokenizer, job.chat_form)
                if measured.prompt and job.check_prompt:
                    job.check_prompt(measured.prompt)
            except BadSample as error:
                write_rejected(rejections, error.reason, f"{job.shard.name}/{sample.key}", error.detail)
                counts.accounts.use({"members": len(sample.members)}, "rejected")
            else:
                rows.append(measured.index_row(sample))
                facts += measured.facts_rows(sample)
                counts.unused_fields.update(unused_fields(raw.record))
                counts.not_read.update(unused_message_keys(raw.record))
                counts.accounts.use({"members": len(sample.members)}, "in_samples")
    reader.close()
    counts.accounts.check(str(job.shard))
    write_facts(job.shard, facts)
    write_index(job.shard, rows, tokenizer_hash=wanted.tokenizer_hash, chat_form=job.chat_form)
    return counts


def _check_media(scan: Scan, sample: ShardSample) -> None:
    """Reject a caption whose images are not read: it would become a sample without them. Raises BadSample."""
    if sample.key in scan.skipped_media and all(member.kind == "txt" for member in sample.members):
        detail = f"{scan.skipped_media[sample.key]} is not read, and the text has no other file: name it KEY.jpg"
        raise BadSample("missing_member", detail)


def _scan(shard: Path) -> Scan:
    """Scan a shard. For a file that is not a tar, return an empty scan with the reason."""
    try:
        return scan_shard(shard)
    except DataError as error:
        return Scan(
            rejected=[("", BadSample("not_a_tar", str(error)))],
            rejected_members=Counter({"": count_members(shard)}),
        )


def _rejected_part(folder: Path, name: str) -> Path:
    return folder / WORK / f"{name}.rejected.jsonl"


def _merge_rejected(folder: Path, names: Collection[str]) -> Counter[str]:
    """Replace the lines about shards that were read, keep the others, and count the lines about `names`."""
    parts = {name: _rejected_part(folder, name) for name in names if _rejected_part(folder, name).is_file()}
    kept: list[str] = []
    if (folder / REJECTED).is_file():
        try:
            kept = [line for line in _lines(folder / REJECTED) if _shard_of(line) not in parts]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise DataError(f"{folder / REJECTED} is damaged, or of another program: rename or remove it") from error
    lines = [*kept, *(line for part in parts.values() for line in _lines(part))]
    write_text(folder / REJECTED, "".join(f"{line}\n" for line in lines))
    for part in parts.values():
        part.unlink()
    if not any((folder / WORK).iterdir()):
        (folder / WORK).rmdir()
    return Counter(json.loads(line)["reason"] for line in lines if _shard_of(line) in names)


def _lines(path: Path) -> list[str]:
    """Split into lines of JSON. str.splitlines() would also split at other characters, which names may contain."""
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n") if path.stat().st_size else []


def _shard_of(line: str) -> str:
    return json.loads(line)["origin"].split("/")[0]
