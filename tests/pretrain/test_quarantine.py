"""Samples that cannot be read cost themselves alone: they are written down, and the run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import webdataset as wds

from data_pipeline.build import index_shards
from data_pipeline.tokens import GlmTokenizer
from tests.data_pipeline.media import encoded, pattern
from tests.launch import metrics, train
from tests.training_data import sentence


def test_truncated_pictures_are_set_aside_and_counted(
    config_file: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Their headers are whole, so the index has them; only decoding finds out."""
    damaged = {"3", "11"}
    folder = tmp_path / "foreign"
    folder.mkdir()
    with wds.TarWriter(str(folder / "pictures-000.tar")) as sink:
        for n in range(16):
            picture = encoded(pattern(60, 90, seed=n))
            sink.write({
                "__key__": str(n),
                "json": {"domain": "image_text", "text": sentence(n, 12)},
                "0.jpg": picture[: len(picture) // 2] if str(n) in damaged else picture,
            })  # fmt: skip
    index_shards([folder / "pictures-000.tar"], tokenizer=GlmTokenizer(tokenizer_folder))

    train(config_file, [f"data.sources=[{{path: {folder}}}]", "checkpoint.save_interval=0"], processes=2)
    run = tmp_path / "run"
    records = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    assert {record["key"] for record in records} == damaged
    for record in records:
        assert record["shard"] == "pictures-000.tar"
        assert record["reason"]
        assert 1 <= record["step"] <= 6
    assert len(metrics(run)) == 6
    assert "samples set aside, see quarantine.jsonl" in (run / "log.txt").read_text()
