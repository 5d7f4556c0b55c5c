"""Steps that are skipped on a GPU leave no trace in weights and moments, whatever optimizer updates them."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.installed import has_transformer_engine
from tests.gpu.test_runs import BF16, run_here
from tests.training.test_bad_steps import SKIP_SPIKES, numbers, skipped_steps

WITH_TE = pytest.mark.skipif(not has_transformer_engine(), reason="needs Transformer Engine")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param([], id="fp32"),
        pytest.param(BF16, id="bf16"),
        pytest.param([*BF16, "optimizer.exp_avg_dtype=bf16"], id="bf16-moments", marks=WITH_TE),
        pytest.param([*BF16, "optimizer.offload_fraction=0.5"], id="half-offloaded"),
    ],
)
def test_spikes_are_skipped_exactly_and_equally_after_a_resume(
    config_file: Path, tmp_path: Path, options: list[str]
) -> None:
    run = run_here(config_file, tmp_path / "run", *options, *SKIP_SPIKES)
    first = skipped_steps(run)[0]
    lines = numbers(run)
    (run / "checkpoints" / "latest").write_text(f"step_{first:07d}\n")
    run_here(config_file, run, *options, *SKIP_SPIKES)
    assert numbers(run) == lines
