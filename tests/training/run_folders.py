"""Run folders as tests need them, without training."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from training.config import RunConfig, load_config


def interrupted_run(config_file: Path, folder: Path, *overrides: str) -> None:
    """Make a run folder as a crash leaves it, with a checkpoint of step 3 (its train state only)."""
    step = folder / "checkpoints" / "step_0000003"
    step.mkdir(parents=True)
    (folder / "checkpoints" / "latest").write_text("step_0000003\n")
    (folder / "metrics.jsonl").write_text('{"step": 3}\n')
    (folder / "config.yaml").write_text("")
    config = asdict(load_config(RunConfig, config_file, overrides))
    (step / "train_state.json").write_text(json.dumps({"step": 3, "data": {}, "config": config}))
    (step / "manifest.json").write_text(json.dumps({"block_bytes": 2**30, "files": {}}))  # compares no file
