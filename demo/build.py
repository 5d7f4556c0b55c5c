"""How the demo's tokenizer, records and shards are built."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import data_pipeline
from common.files import write_json
from data_pipeline.errors import REJECTED, DataError
from data_pipeline.sharding.build import build_shards
from demo.media import scenes, subjects
from demo.records import DESCRIBE, NAME, WATCH, Library, sources
from demo.texts import documents
from demo.tokenizer import train_tokenizer

CODE = ("build.py", "media.py", "media.yaml", "records.py", "texts.py", "tokenizer.py")
MARKER = "built.json"  # written last: what was built, and by which code
SENTENCE_REPEATS = 8  # in the tokenizer's training text, so that the words of captions and answers become tokens


def tokenizer_texts() -> Iterator[str]:
    yield from documents()
    for _ in range(SENTENCE_REPEATS):
        for subject in subjects():
            yield from (subject.caption, subject.noun)
            yield from (f"{question} {answer}" for question, answer in subject.ask.items())
        yield from (scene.caption for scene in scenes())
        yield from (NAME, *DESCRIBE, *WATCH)


def build_once(out: Path) -> dict[str, int]:
    """Build, unless `out` already holds what this code builds; return the number of samples per source."""
    marker = out / MARKER
    if marker.is_file() and (built := json.loads(marker.read_text()))["made_by"] == _code_hash():
        return built["samples"]
    return build(out)


def build(out: Path) -> dict[str, int]:
    """Write tokenizer, records and shards under `out`, replacing what is there; return the samples per source.

    Raises:
        DemoError: a package that ships media is missing.
        DataError: a record was rejected.
    """
    (out / MARKER).unlink(missing_ok=True)
    for stale in ("records", "shards", "tokenizer"):
        shutil.rmtree(out / stale, ignore_errors=True)
    train_tokenizer(tokenizer_texts(), out / "tokenizer")
    library = Library(out / "records")
    library.root.mkdir(parents=True)
    samples = {}
    for name, records in sources(library).items():
        jsonl = library.root / f"{name}.jsonl"
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        jsonl.write_text("".join(lines), encoding="utf-8")
        counts = build_shards([jsonl], out / "shards" / name, tokenizer=out / "tokenizer", name=name).counts
        if counts.rejected:
            raise DataError(f"records of {jsonl} were rejected: see {out / 'shards' / name / REJECTED}")
        samples[name] = len(lines)
    write_json(out / MARKER, {"made_by": _code_hash(), "samples": samples})
    return samples


def _code_hash() -> str:
    """Hash whatever decides the shards: the demo's modules, the list of media, and the data pipeline."""
    code = [*map(Path(__file__).with_name, CODE), *Path(str(data_pipeline.__file__)).parent.rglob("*.py")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(code))).hexdigest()
