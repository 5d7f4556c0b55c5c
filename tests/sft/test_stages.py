"""The whole road in small: pretrain on two ranks, fine-tune from that, export, and let transformers judge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from data_pipeline.encoding.batch import collate
from data_pipeline.encoding.encode import encode_record
from data_pipeline.encoding.tokenizer import GlmTokenizer
from data_pipeline.media.pixel_budget import PixelBudget
from tests.data_pipeline.media_files import encoded, pattern
from tests.launch import metrics, train
from tests.processes import Processes
from tests.training_data import sentence
from tools.convert import export_checkpoint
from tools.generate import transformers_inputs
from training.evaluate import evaluate

KEYS = {"step", "loss", "lr", "grad_norm", "tokens", "padding_fraction", "samples", "images", "patches",
        "step_seconds", "tokens_per_second", "expert_load/max", "expert_load/min", "balance_loss"}  # fmt: skip
RUN_FILES = {"config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "quarantine.jsonl", "log.txt",
             "run.lock"}  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "layout"),
    [
        ("tiny_moe", "parallel.expert_model_parallel_size=2"),
        ("tiny_dense", "parallel.tensor_model_parallel_size=2 parallel.sequence_parallel=true"),
    ],
)
def test_pretrain_fine_tune_export(
    config_file: Path, shards: Path, tokenizer_folder: Path, tmp_path: Path, preset: str, layout: str
) -> None:
    pretrained, tuned = tmp_path / "run", tmp_path / "tuned"
    model = f"model.preset={preset}"
    train(config_file, [model, *layout.split(), "train.precision=bf16"])
    assert {path.name for path in pretrained.iterdir()} == RUN_FILES
    lines = metrics(pretrained)
    domains = {"loss/image_text", "loss/text", "loss/video"}
    expected = KEYS if preset == "tiny_moe" else {k for k in KEYS if not k.startswith(("expert", "balance"))}
    assert expected <= lines[0].keys() <= expected | domains
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert [line["lr"] for line in lines[:2]] == pytest.approx([1e-3, 2e-3])  # warm-up over two steps
    assert lines[-1]["lr"] == pytest.approx(1e-4)

    chats = [f"data.sources=[{{path: {shards}/chats}}]", "train.seq_length=256", f"train.output_dir={tuned}"]
    train(config_file, [model, *layout.split(), *chats, f"model.init_from={pretrained}"], entry="sft.train")
    assert {key for line in metrics(tuned) for key in line if key.startswith("loss/")} == {"loss/chat"}
    # It started from the pretrained weights, not from random ones.
    assert metrics(tuned)[0]["loss"] < lines[0]["loss"] - 0.2

    exported = tmp_path / "exported"
    with Processes(1) as process:
        process.run(export, checkpoint=str(tuned), out=str(exported))
        record, picture = held_out()
        ours = process.run(our_loss, run=str(tuned), tokenizer=str(tokenizer_folder))[0]
    reference = AutoModelForImageTextToText.from_pretrained(exported, dtype=torch.float32).eval()
    sample = encode_record(
        record, [picture], [], tokenizer=GlmTokenizer(exported), budget=PixelBudget(image_max_tokens=16)
    )
    preprocessor = json.loads((exported / "preprocessor_config.json").read_text())
    inputs = transformers_inputs(sample, reference.config.image_token_id, preprocessor)
    labels = inputs["input_ids"].masked_fill(~torch.from_numpy(sample.loss)[None], -100)
    with torch.no_grad():
        theirs = reference(**inputs, labels=labels).loss.item()
    assert ours == pytest.approx(theirs, rel=1e-4)


def held_out() -> tuple[dict[str, object], bytes]:
    return {"domain": "image_text", "text": sentence(77, 12)}, encoded(pattern(70, 90, seed=77))


def export(checkpoint: str, out: str) -> None:
    import torch.distributed as dist

    from model.checkpoint import find_checkpoint

    dist.destroy_process_group()
    export_checkpoint(find_checkpoint(checkpoint), Path(out))


def our_loss(run: str, tokenizer: str) -> float:
    record, picture = held_out()
    sample = encode_record(
        record, [picture], [], tokenizer=GlmTokenizer(tokenizer), budget=PixelBudget(image_max_tokens=16)
    )
    return evaluate(Path(run), [collate([sample], seq_length=64, segment_multiple=8, pad_id=0)])["loss"]
