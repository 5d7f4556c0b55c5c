"""Runs that start from weights in another format: the same losses, and exports of plain weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.aimv2_folders import save_aimv2, save_decoder
from tests.hf_folders import save_weights, save_whole_folder
from tests.launch import metrics, train
from tests.model.range_server import RangeServer
from tests.model.test_formats import quantise
from tests.training_data import build, sentence
from tools.assembly import plan_assembly, write_assembly
from tools.conversion import export_checkpoint, import_folder
from training.hf_files import PREPROCESSORS, PROCESSOR
from training.lora_base import base_fingerprint

SHORT = ("model.preset=", "train.steps=2", "checkpoint.save_interval=2", "optimizer.warmup_steps=1")
EP2 = ("parallel.expert_model_parallel_size=2",)


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run)]


@pytest.mark.slow
def test_a_run_from_fp8_has_the_losses_of_a_run_from_the_products(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of two ranks reads the experts that it holds, with their scales: from a folder, and from a URL."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    plain = save_weights("glm4v_moe", tmp_path / "source", dtype=torch.bfloat16)
    expected = quantise(plain, tmp_path / "fp8", "blocks of 32")
    shutil.copytree(plain, tmp_path / "products")
    save_file(expected, tmp_path / "products/model.safetensors", metadata={"format": "pt"})
    runs = {}
    for start in ("fp8", "products"):
        runs[start] = tmp_path / f"run_{start}"
        train(config_file, [*SHORT, *EP2, f"model.init_from={tmp_path / start}", f"train.output_dir={runs[start]}"])
    runs["url"] = tmp_path / "run_url"
    with RangeServer(tmp_path / "fp8") as server:
        start = f"model.init_from='{server.url}?sig=secret'"
        train(config_file, [*SHORT, *EP2, start, f"train.output_dir={runs['url']}"])
    assert losses(runs["fp8"]) == losses(runs["products"]) == losses(runs["url"])
    nbytes = sum(path.stat().st_size for path in (tmp_path / "fp8").glob("*.safetensors"))
    assert nbytes < server.sent.total() < 1.8 * nbytes, "two ranks read less than twice the whole"
    log = (runs["url"] / "log.txt").read_text()
    assert f"weights are read from {server.url}; its other files are copied to {tmp_path}/cache/" in log
    assert "secret" not in log
    assert "weights read as: FP8, block scales 32x32 (100)" in log
    assert "weights read as: FP8, block scales 32x32 (100)" in (runs["fp8"] / "log.txt").read_text()
    assert "read as" not in (runs["products"] / "log.txt").read_text()
    config = (runs["fp8"] / "checkpoints/step_0000002/hf/config.json").read_text()
    assert "quantization" not in config


@pytest.mark.fast
def test_the_base_of_a_lora_run_is_told_by_its_scales_too(tmp_path: Path) -> None:
    plain = save_weights("glm4v_moe", tmp_path / "source", dtype=torch.bfloat16)
    quantise(plain, tmp_path / "fp8", "tensor")
    before = base_fingerprint(tmp_path / "fp8", seed=0)
    assert base_fingerprint(tmp_path / "fp8", seed=0) == before
    path = sorted((tmp_path / "fp8").glob("*.safetensors"))[1]
    scales = load_file(path)
    scales[min(scales)] *= 2
    save_file(scales, path, metadata={"format": "pt"})
    assert base_fingerprint(tmp_path / "fp8", seed=0) != before


def test_a_flash_stays_a_flash_through_import_training_and_export(config_file: Path, tmp_path: Path) -> None:
    """Its type, class and processors: in files of their own, and inside the one file of transformers 5."""
    start = save_whole_folder("glm46v", tmp_path / "flash")
    image, video = (json.loads((start / name).read_text()) for name in PREPROCESSORS.values())
    inside = {"processor_class": "Glm46VProcessor", "image_processor": image, "video_processor": video}
    (start / PROCESSOR).write_text(json.dumps(inside))
    import_folder(start, tmp_path / "checkpoint")
    text: list[dict[str, object]] = [{"domain": "text", "text": sentence(n, 20)} for n in range(16)]
    shards = build(tmp_path / "text", text, start, chat_form="glm46v")
    data = (f"data.tokenizer={start}", f"data.sources=[{{path: {shards}}}]", "train.global_batch_size=2")
    train(config_file, [*SHORT, *data, f"model.init_from={tmp_path / 'checkpoint'}"])
    export_checkpoint(tmp_path / "run", tmp_path / "export")
    model, report = transformers.Glm46VForConditionalGeneration.from_pretrained(
        tmp_path / "export", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.model_type == "glm46v"
    assert {path.name for path in start.iterdir()} < {path.name for path in (tmp_path / "export").iterdir()}
    whole = json.loads((tmp_path / "export" / PROCESSOR).read_text())
    for key, budget in (("image_processor", 16), ("video_processor", 60)):
        assert whole[key].pop("size")["longest_edge"] == budget * 28 * 28 * 2
        del inside[key]["size"]
    assert whole == inside
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "export" / name).read_bytes() == (start / name).read_bytes()


@pytest.mark.slow
def test_a_run_starts_from_an_assembly(config_file: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    save_aimv2(tmp_path / "aimv2")
    save_decoder("glm4_moe", tmp_path / "decoder")
    assembly = plan_assembly(tmp_path / "aimv2", tmp_path / "decoder", tokenizer=tokenizer_folder)
    write_assembly(assembly, tmp_path / "initial")
    train(config_file, [*SHORT, *EP2, f"model.init_from={tmp_path / 'initial'}"])
    assert len(losses(tmp_path / "run")) == 2
    config = json.loads((tmp_path / "run/checkpoints/step_0000002/hf/config.json").read_text())
    assert config["text_config"]["rope_theta"] == 1_000_000
    assert config["text_config"]["max_position_embeddings"] == 131_072
