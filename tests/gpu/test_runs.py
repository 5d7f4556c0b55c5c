"""Whole runs on one GPU, started with torchrun."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.installed import has_transformer_engine
from tests.launch import finish, has_reached, kill_rank_when, metrics, start, train
from tests.training.test_resume import trace


def of_backend(name: str) -> list[str]:
    return [f"model.backend={name}", "train.precision=bf16"]


@pytest.mark.parametrize("preset", ["tiny_moe", "tiny_dense"])
def test_float32_losses_equal_those_of_a_cpu(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    common = [f"model.preset={preset}", "checkpoint.save_interval=0"]
    train(config_file, [*common, f"train.output_dir={tmp_path}/gpu"], processes=1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    train(config_file, [*common, f"train.output_dir={tmp_path}/cpu"], processes=1)
    for gpu, cpu in zip(metrics(tmp_path / "gpu"), metrics(tmp_path / "cpu"), strict=True):
        assert gpu["loss"] == pytest.approx(cpu["loss"], rel=1e-5)
        assert gpu["grad_norm"] == pytest.approx(cpu["grad_norm"], rel=1e-4)


def test_bf16_losses_are_close_to_float32(config_file: Path, tmp_path: Path, backend_name: str) -> None:
    train(config_file, ["checkpoint.save_interval=0", f"train.output_dir={tmp_path}/fp32"], processes=1)
    half = [*of_backend(backend_name), "checkpoint.save_interval=0", f"train.output_dir={tmp_path}/bf16"]
    output = train(config_file, half, processes=1)
    assert f"backend: {backend_name}" in output
    for bf16, fp32 in zip(metrics(tmp_path / "bf16"), metrics(tmp_path / "fp32"), strict=True):
        assert bf16["loss"] == pytest.approx(fp32["loss"], rel=5e-3)


def test_killed_and_resumed_run_equals_an_uninterrupted_one(
    config_file: Path, tmp_path: Path, backend_name: str
) -> None:
    """Bit for bit; each step is computed twice and compared."""
    common = [*of_backend(backend_name), "train.deterministic=true", "train.check_determinism=1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(config_file, [*common, f"train.output_dir={whole}", "checkpoint.save_interval=0"], processes=1)

    command = [*common, f"train.output_dir={killed}"]
    launcher = start(config_file, command, processes=1)
    kill_rank_when(has_reached, launcher, killed, step=5, rank=0)
    finish(launcher)
    assert (killed / "checkpoints" / "latest").read_text() == "step_0000003\n"
    train(config_file, command, processes=1)
    assert trace(killed) == trace(whole)


@pytest.mark.skipif(not has_transformer_engine(), reason="needs Transformer Engine")
@pytest.mark.parametrize(("first", "second"), [("torch", "transformer_engine"), ("transformer_engine", "torch")])
def test_run_resumes_with_the_other_backend(config_file: Path, tmp_path: Path, first: str, second: str) -> None:
    whole, moved = (["checkpoint.save_interval=3", f"train.output_dir={tmp_path}/{name}"] for name in ("one", "moved"))
    train(config_file, [*of_backend(first), *whole], processes=1)
    train(config_file, [*of_backend(first), *moved], processes=1)
    (tmp_path / "moved" / "checkpoints" / "latest").write_text("step_0000003\n")
    train(config_file, [*of_backend(second), *moved], processes=1)
    for line, expected in zip(metrics(tmp_path / "moved"), metrics(tmp_path / "one"), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=5e-3)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=5e-2)
