"""Small shards of the demo's real samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline.sharding.build import build_shards
from demo.records import Library, captions, describing_chat, interleaved, text


@pytest.fixture(scope="session")
def small_shards(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """Return a folder of shards: captions, documents of several images, chats and text."""
    out = tmp_path_factory.mktemp("demo")
    library = Library(out / "records")
    records = {
        "captions": captions(library, "train", 1),
        "interleaved": interleaved(library, 10, (2, 3)),
        "chat": describing_chat(library, "train", 1),
        "text": text(),
    }
    for name, lines in records.items():
        jsonl = library.root / f"{name}.jsonl"
        jsonl.parent.mkdir(exist_ok=True)
        jsonl.write_text("".join(json.dumps(record) + "\n" for record in lines), encoding="utf-8")
        assert not build_shards([jsonl], out / name, tokenizer=tokenizer_folder, name=name).counts.rejected
    return out
