"""What a source reports about all of its samples, from indexes only."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.config import SourceConfig
from data_pipeline.plan.plan import PlanPosition
from data_pipeline.sharding.build import build_shards
from tests.data_pipeline.loaders import loader

pytestmark = pytest.mark.fast

TEXT = {"domain": "text", "text": "Some text."}
CHAT = {
    "domain": "chat",
    "messages": [
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "Hello.", "reasoning_content": "Hm."},
    ],
    "thinking": True,
}


def built(folder: Path, records: list[dict], tokenizer, **options) -> SourceConfig:
    folder.mkdir()
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    build_shards([folder / "records.jsonl"], folder / "shards", tokenizer=tokenizer.folder, **options)
    return SourceConfig(str(folder / "shards"), name=folder.name)


def test_has_media_is_false_for_sources_of_text_only(tmp_path, tokenizer, data_config):
    text = built(tmp_path / "text", [TEXT, CHAT], tokenizer)
    assert not loader(replace(data_config, sources=[text])).has_media
    assert loader(data_config).has_media
    assert loader(replace(data_config, sources=[text, *data_config.sources])).has_media


def test_chat_forms_are_those_of_the_shards_with_chats(tmp_path, tokenizer, data_config):
    """One sample per shard. The form of a shard without chats does not matter."""
    sources = [
        built(tmp_path / "text", [TEXT], tokenizer, chat_form="glm41v"),
        built(tmp_path / "chats", [CHAT, TEXT], tokenizer, chat_form="glm41v", shard_bytes=1),
        built(tmp_path / "both", [CHAT], tokenizer, chat_form="glm45v"),
    ]
    other = built(tmp_path / "other", [TEXT, CHAT, TEXT], tokenizer, chat_form="glm41v", shard_bytes=1)
    for file in Path(other.path).iterdir():
        if file.name.startswith("shard"):
            file.rename(Path(sources[2].path) / f"other-{file.name}")
    (Path(sources[2].path) / "catalogue.arrow").unlink()
    packed = loader(replace(data_config, sources=sources))
    assert packed.chat_forms == {"chats": ["glm41v"], "both": ["glm41v", "glm45v"]}


def test_source_use_counts_how_often_a_step_repeats_a_source(tmp_path, tokenizer, data_config):
    one = built(tmp_path / "one", [TEXT], tokenizer)
    packed = loader(replace(data_config, sources=[replace(one, weight=1.0), *data_config.sources]))
    first, big, small = packed.source_use()
    steps, _ = packed.plan.window(PlanPosition.start(3))
    begun = [piece for step in steps for pack in step for piece in pack.pieces if piece.source == 0]
    assert (first.label, first.samples, first.is_repeated) == ("one", 1, True)
    assert first.repeats_per_step == len(begun) / len(steps)
    assert (big.samples, small.samples) == (96, 40)
