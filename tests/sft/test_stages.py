"""End to end in small: pretrain on two ranks, fine-tune from that, export, and compare with transformers."""

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
from tools.conversion import export_checkpoint
from tools.exported import transformers_inputs
from training.evaluate import evaluate

KEYS = {
    "step",
    "loss",
    "lr",
    "grad_norm",
    "tokens",
    "padding_fraction",
    "samples",
    "images",
    "patches",
    "step_seconds",
    "tokens_per_second",
    "expert_load/max",
    "expert_load/min",
    "balance_loss",
}
RUN_FILES = {
    "config.yaml",
    "metrics.jsonl",
    "tensorboard",
    "checkpoints",
    "quarantine.jsonl",
    "log.txt",
    "run.lock",
    "state.json",
}
LONGER = ["train.seq_length=256", "model.max_position_embeddings=200", "model.rope_theta=50000"]


@pytest.mark.parametrize(
    ("preset", "layout", "chats"),
    [
        ("tiny_moe", "parallel.expert_model_parallel_size=2", "chats"),
        ("tiny_dense", "parallel.tensor_model_parallel_size=2 parallel.sequence_parallel=true", "chats_glm41v"),
    ],
)
def test_pretrain_fine_tune_export(
    config_file: Path, shards: Path, tokenizer_folder: Path, tmp_path: Path, preset: str, layout: str, chats: str
) -> None:
    """Fine-tuning also changes the model's length and rope base; transformers computes the export with both."""
    pretrained, tuned = tmp_path / "run", tmp_path / "tuned"
    model = f"model.preset={preset}"
    train(config_file, [model, *layout.split(), "train.precision=bf16"])
    assert {path.name for path in pretrained.iterdir()} == RUN_FILES
    lines = metrics(pretrained)
    expected = KEYS if preset == "tiny_moe" else {k for k in KEYS if not k.startswith(("expert", "balance"))}
    assert expected <= lines[0].keys()
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert [line["lr"] for line in lines[:2]] == pytest.approx([1e-3, 2e-3])  # warm-up over two steps
    assert lines[-1]["lr"] == pytest.approx(1e-4)

    sft = [f"data.sources=[{{path: {shards}/{chats}}}]", *LONGER, f"train.output_dir={tuned}"]
    output = train(config_file, [model, *layout.split(), *sft, f"model.init_from={pretrained}"], entry="sft.train")
    assert "train.seq_length=256 is above the model's max_position_embeddings 200, and engines refuse" in output
    assert f"source '{chats}' has only 12 samples: a step takes" in output
    assert {key for line in metrics(tuned) for key in line if key.startswith("loss/")} == {"loss/chat"}
    # It started from the pretrained weights, not from random ones.
    assert metrics(tuned)[0]["loss"] < lines[0]["loss"] - 0.2

    exported = tmp_path / "exported"
    with Processes(1) as process:
        process.run(export, checkpoint=str(tuned), out=str(exported))
        record, image = held_out()
        loss = process.run(loss_of_checkpoint, run=str(tuned), tokenizer=str(tokenizer_folder))[0]
    reference = AutoModelForImageTextToText.from_pretrained(exported, dtype=torch.float32).eval()
    text_config = reference.config.text_config
    assert text_config.max_position_embeddings == 200
    assert text_config.rope_parameters["rope_theta"] == 50000
    sample = encode_record(
        record, [image], [], tokenizer=GlmTokenizer(exported), budget=PixelBudget(image_max_tokens=16)
    )
    preprocessor = json.loads((exported / "preprocessor_config.json").read_text())
    inputs = transformers_inputs(sample, reference.config.image_token_id, preprocessor)
    labels = inputs["input_ids"].masked_fill(~torch.from_numpy(sample.loss)[None], -100)
    with torch.no_grad():
        expected = reference(**inputs, labels=labels).loss.item()
    assert loss == pytest.approx(expected, rel=1e-4)


def held_out() -> tuple[dict[str, object], bytes]:
    return {"domain": "image_text", "text": sentence(77, 12)}, encoded(pattern(70, 90, seed=77))


def export(checkpoint: str, out: str) -> None:
    import torch.distributed as dist

    from model.checkpoint import find_checkpoint

    dist.destroy_process_group()
    export_checkpoint(find_checkpoint(checkpoint), Path(out))


def loss_of_checkpoint(run: str, tokenizer: str) -> float:
    record, image = held_out()
    sample = encode_record(
        record, [image], [], tokenizer=GlmTokenizer(tokenizer), budget=PixelBudget(image_max_tokens=16)
    )
    return evaluate(Path(run), [collate([sample], seq_length=64, segment_multiple=8, pad_id=0)])["loss"]
