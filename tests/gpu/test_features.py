"""What a run measures and adapts on a GPU."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from model.lora_dropout import AdapterDropout, PackNumber
from tests.dropout_reference import expected_mask
from tests.gpu.test_runs import BF16, EXACT, WITH_TE, run_here, set_back
from tests.launch import metrics
from tests.training.test_resume import trace

LORA = ["lora.rank=4", "lora.targets=[all-linear]", "lora.dropout=0.1"]


def test_metrics_have_times_memory_and_norms_of_parts(config_file: Path, tmp_path: Path, backend_name: str) -> None:
    options = [*BF16, f"model.backend={backend_name}", "metrics.peak_tflops=900", "checkpoint.save_interval=0"]
    for line in metrics(run_here(config_file, tmp_path / "run", *options))[1:]:  # times are those of the step before
        times = [line[f"seconds/{part}"] for part in ("vision", "decoder", "communication", "optimizer")]
        assert all(seconds >= 0 for seconds in times)
        assert sum(times) > 0
        assert 0 < line["memory_gb"] <= line["memory_gb/reserved"]
        assert 0 < line["mfu"] < 1
        squares = sum(value**2 for key, value in line.items() if key.startswith("grad_norm/"))
        assert squares == pytest.approx(line["grad_norm"] ** 2, rel=1e-4)


def test_profile_has_kernels_and_changes_no_bit(config_file: Path, tmp_path: Path) -> None:
    options = [*BF16, "train.deterministic=true", "checkpoint.save_interval=0"]
    plain = run_here(config_file, tmp_path / "plain", *options)
    profiled = run_here(config_file, tmp_path / "profiled", *options, "profile.start=3")
    assert trace(profiled) == trace(plain)
    with gzip.open(profiled / "profile" / "rank_0.json.gz") as file:
        events = json.load(file)["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)
    assert {"step 3", "step 4"} <= {event.get("name") for event in events}


def test_validation_changes_no_bit(config_file: Path, shards: Path, tmp_path: Path, backend_name: str) -> None:
    options = [*BF16, f"model.backend={backend_name}", "train.deterministic=true", "checkpoint.save_interval=0"]
    held_out = [f"validation.sources=[{{path: {shards}/chats}}]", "validation.interval=2"]
    plain = run_here(config_file, tmp_path / "plain", *options)
    validated = run_here(config_file, tmp_path / "validated", *options, *held_out)
    assert trace(validated) == trace(plain)
    assert len((validated / "validation.jsonl").read_text().splitlines()) == 3


@WITH_TE
def test_lora_is_the_same_with_both_backends_and_resumes_bit_for_bit(config_file: Path, tmp_path: Path) -> None:
    base = run_here(config_file, tmp_path / "base", *BF16, "model.backend=torch")
    found = {}
    for backend in ("torch", "transformer_engine"):
        options = [*EXACT, *LORA, f"model.backend={backend}", f"model.init_from={base}"]
        folder = run_here(config_file, tmp_path / backend, *options)
        found[backend] = metrics(folder)
        whole = trace(folder)
        set_back(folder)
        run_here(config_file, folder, *options)
        assert trace(folder) == whole
    for line, expected in zip(found["transformer_engine"], found["torch"], strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=5e-3)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=5e-2)


def test_masks_of_dropout_are_those_of_the_formula() -> None:
    rows, channels = range(4000, 5001), range(129, 770)
    dropout = AdapterDropout(0.1, seed=3)
    dropout.begin(PackNumber(step=2, pack=1))
    dropout.work_on(torch.tensor(rows))
    mask = dropout.mask("model.language_model.layers.0.self_attn.o_proj", channels)
    assert mask is not None
    found = mask.keeps()
    assert found.is_cuda
    expected = expected_mask("3/2/1/model.language_model.layers.0.self_attn.o_proj", rows, channels, 0.1)
    assert (found.cpu().numpy() == expected).all()
