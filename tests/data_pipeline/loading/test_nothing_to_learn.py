"""Samples that `data.too_long=truncate` cuts before their first token with loss."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.errors import DataError
from data_pipeline.sharding.build import build_shards
from tests.data_pipeline.loaders import loader, take
from tests.data_pipeline.media_files import encoded, pattern

pytestmark = pytest.mark.fast

SEQ_LENGTH = 128


def chat(question: str, answer: str) -> dict:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"domain": "chat", "thinking": False, "messages": messages}


def shards_of(records: list[dict], folder: Path, tokenizer_folder: Path, config: DataConfig) -> DataConfig:
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    build_shards([folder / "records.jsonl"], folder / "out", tokenizer=tokenizer_folder)
    return replace(config, sources=[SourceConfig(str(folder / "out"), epochs=1)], too_long="truncate")


def test_truncated_samples_without_loss_are_quarantined_replaced_and_counted(tmp_path, tokenizer_folder, data_config):
    (tmp_path / "large.png").write_bytes(encoded(pattern(280, 308), "PNG"))  # 110 tokens
    records = [chat("A long question? " * 60, "The answer."), chat("Short?", "A long answer. " * 60)]
    records += [{"domain": "image_text", "text": "A caption. " * 60, "images": ["large.png"]}]
    records += [chat(f"Question {number}?", f"Answer {number}.") for number in range(20)]
    config = shards_of(records, tmp_path, tokenizer_folder, replace(data_config, image_max_tokens=110))
    packed = loader(config, seq_length=SEQ_LENGTH, batch=2)
    batches = [batch for step in iter(packed.next_step, []) for batch in step]

    quarantined = [line for batch in batches for line in batch.quarantined]
    assert [(line["reason"], line["key"]) for line in quarantined] == [("nothing_to_learn", "00000-000000")]
    assert f"none of its first {SEQ_LENGTH} tokens (of" in quarantined[0]["detail"]
    trained = Counter(name.rpartition("-")[2] for batch in batches for name in batch.sample_ids if name)
    replacement = quarantined[0]["replaced_by"].rpartition("-")[2]
    assert trained == Counter({f"{number:06d}" for number in range(1, 23)}) + Counter([replacement])
    for batch in batches:
        bounds, lengths = batch.cu_seqlens.tolist(), batch.segment_lengths.tolist()
        for start, length in zip(bounds[:-1], lengths, strict=True):
            assert not length or batch.loss_mask[start : start + length].any()


def test_run_of_chats_that_are_all_truncated_before_their_answer_stops(tmp_path, tokenizer_folder, data_config):
    records = [chat(f"A long question {number}? " * 60, "The answer.") for number in range(60)]
    config = shards_of(records, tmp_path, tokenizer_folder, data_config)
    packed = loader(config, seq_length=SEQ_LENGTH, batch=16)
    batches = take(packed, 1)
    quarantined = [line for batch in batches for line in batch.quarantined]
    assert {line["reason"] for line in quarantined} == {"nothing_to_learn"}
    assert {line["replaced_by"] for line in quarantined} == {""}
    assert len(quarantined) > 10
    assert sum(batch.num_tokens for batch in batches) == 0
    packed.tally.add(0, quarantined)
    with pytest.raises(DataError, match="nothing_to_learn"):
        packed.tally.check(0.01, "quarantine.jsonl")
