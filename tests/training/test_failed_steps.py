"""Runs that stop at a step: the error says why, and the step's samples are listed."""

from __future__ import annotations

import json
import re
from pathlib import Path

from model.config import GlmvConfig
from tests.launch import fail, metrics
from tests.training_data import build, sentence
from training.config import RunConfig, load_config
from training.setup import build_loader


def test_samples_of_a_step_that_is_not_finite_are_listed(config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    errors = fail(config_file, ["optimizer.lr=1e30", "optimizer.warmup_steps=0", "optimizer.clip_grad=0"])
    steps = len(metrics(run))
    assert 1 <= steps < 6
    file = run / "bad_steps" / f"step_{steps + 1:07d}.json"
    assert set(errors) <= {
        f"step {steps + 1}: the loss is {loss}; its samples are listed in {file}" for loss in ("nan", "inf")
    }
    assert list(file.parent.iterdir()) == [file]
    listed = json.loads(file.read_text())
    assert listed["step"] == steps + 1
    assert listed["action"] == "stop"
    assert re.fullmatch("the loss is (nan|inf)", listed["reason"])
    config = load_config(RunConfig, config_file, ["data.num_workers=0"])
    loader = build_loader(config, GlmvConfig.from_preset("tiny_moe"))
    loader.skip(steps)
    packs = loader.next_step()  # of both data-parallel ranks, in order
    assert [pack["pack"] for pack in listed["packs"]] == [0, 1, 2, 3]
    for pack, batch in zip(listed["packs"], packs, strict=True):
        names = [f"{sample['shard']}/{sample['key']}" for sample in pack["samples"]]
        assert names == [name for name in batch.sample_ids if name]
        assert sum(sample["tokens"] for sample in pack["samples"]) == batch.num_tokens
        assert all(sample["shard"].startswith(f"{sample['source']}-") for sample in pack["samples"])


def test_chats_without_their_answers_do_not_train_at_loss_0(
    config_file: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """data.too_long=truncate cuts every answer off."""
    messages = [{"role": "user", "content": sentence(1, 300)}, {"role": "assistant", "content": sentence(2, 5)}]
    (tmp_path / "data").mkdir()
    chats = [{"domain": "chat", "messages": messages, "thinking": False} for _ in range(40)]
    source = build(tmp_path / "data" / "long_chats", chats, tokenizer_folder)
    options = [f"data.sources=[{{path: {source}}}]", "data.too_long=truncate", "data.max_quarantined_fraction=1"]
    errors = fail(config_file, options, processes=1)
    assert re.search(r"carries loss; look at their sources, and at data.too_long|no sample of the global", errors[0])
    assert not metrics(tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
