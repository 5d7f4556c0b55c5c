"""Whole runs on one GPU, in this process: on a GPU's machine every new process imports for many seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.installed import has_transformer_engine
from tests.launch import metrics, train
from tests.training.test_resume import trace
from tests.training.test_saving import files_of_run
from training.config import RunConfig, load_config
from training.loop import run

BF16 = ["train.precision=bf16"]
EXACT = [*BF16, "train.deterministic=true", "train.check_determinism=1"]  # each step is computed twice and compared
WITH_TE = pytest.mark.skipif(not has_transformer_engine(), reason="needs Transformer Engine")
OPTIMIZERS = {
    "bf16-gradients": ["optimizer.main_grads=bf16"],
    "bf16-moments": ["optimizer.exp_avg_dtype=bf16", "optimizer.exp_avg_sq_dtype=bf16"],
    "fp16-moments": [
        "optimizer.exp_avg_dtype=fp16",
        "optimizer.exp_avg_sq_dtype=fp16",
        "optimizer.main_grads=bf16",
    ],
    "half-offloaded": ["optimizer.offload_fraction=0.5"],
    "all-offloaded": ["optimizer.offload_fraction=1.0"],
}


def run_here(config_file: Path, folder: Path, *overrides: str) -> Path:
    """Run in this process, without loader processes, and return the run folder."""
    run(load_config(RunConfig, config_file, [*overrides, f"train.output_dir={folder}", "data.num_workers=0"]))
    return folder


def set_back(folder: Path) -> None:
    """Make the run resume from its checkpoint of step 3."""
    (folder / "checkpoints" / "latest").write_text("step_0000003\n")


@pytest.mark.parametrize("preset", ["tiny_moe", "tiny_dense"])
def test_float32_losses_equal_those_of_a_cpu(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    common = [f"model.preset={preset}", "checkpoint.save_interval=0"]
    run_here(config_file, tmp_path / "gpu", *common)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    train(config_file, [*common, f"train.output_dir={tmp_path}/cpu"], processes=1)
    for gpu, cpu in zip(metrics(tmp_path / "gpu"), metrics(tmp_path / "cpu"), strict=True):
        assert gpu["loss"] == pytest.approx(cpu["loss"], rel=1e-5)
        assert gpu["grad_norm"] == pytest.approx(cpu["grad_norm"], rel=1e-4)


def test_bf16_losses_are_close_to_float32(config_file: Path, tmp_path: Path, backend_name: str) -> None:
    fp32 = run_here(config_file, tmp_path / "fp32", "checkpoint.save_interval=0")
    bf16 = run_here(config_file, tmp_path / "bf16", *BF16, f"model.backend={backend_name}")
    assert f"backend: {backend_name}" in (bf16 / "log.txt").read_text()
    for line, expected in zip(metrics(bf16), metrics(fp32), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=5e-3)


def test_resumed_run_equals_an_uninterrupted_one(config_file: Path, tmp_path: Path, backend_name: str) -> None:
    folder = run_here(config_file, tmp_path / "run", *EXACT, f"model.backend={backend_name}")
    whole = trace(folder)
    set_back(folder)
    run_here(config_file, folder, *EXACT, f"model.backend={backend_name}")
    assert "step 3 of 6, from" in (folder / "log.txt").read_text()
    assert trace(folder) == whole


@WITH_TE
@pytest.mark.parametrize(("first", "second"), [("torch", "transformer_engine"), ("transformer_engine", "torch")])
def test_run_resumes_with_the_other_backend(config_file: Path, tmp_path: Path, first: str, second: str) -> None:
    folder = run_here(config_file, tmp_path / "run", *BF16, f"model.backend={first}")
    whole = metrics(folder)
    set_back(folder)
    run_here(config_file, folder, *BF16, f"model.backend={second}")
    for line, expected in zip(metrics(folder), whole, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=5e-3)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=5e-2)


@WITH_TE
@pytest.mark.parametrize("options", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_small_optimizer_states_follow_float32_and_resume_bit_for_bit(
    config_file: Path, tmp_path: Path, options: list[str]
) -> None:
    plain = run_here(config_file, tmp_path / "plain", *BF16, "checkpoint.save_interval=0")
    small = run_here(config_file, tmp_path / "small", *EXACT, *options)
    for line, expected in zip(metrics(small), metrics(plain), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=5e-3)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=5e-2)
    whole = trace(small)
    set_back(small)
    run_here(config_file, small, *EXACT, *options)
    assert trace(small) == whole


@pytest.mark.parametrize("options", [["model.backend=torch"], *OPTIMIZERS.values()], ids=["plain", *OPTIMIZERS])
def test_saves_in_the_background_have_the_bytes_of_other_saves(
    config_file: Path, tmp_path: Path, options: list[str]
) -> None:
    if options[0].startswith("optimizer.") and not has_transformer_engine():
        pytest.skip("needs Transformer Engine")
    common = [*EXACT, *options, "checkpoint.save_interval=1"]
    here = run_here(config_file, tmp_path / "at_once", *common)
    there = run_here(config_file, tmp_path / "background", *common, "checkpoint.async_save=true")
    assert files_of_run(here) == files_of_run(there)
    assert len(files_of_run(there)) == 6
    assert trace(here) == trace(there)
