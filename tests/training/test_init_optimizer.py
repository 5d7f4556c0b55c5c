"""`model.init_optimizer`: a stage continues with the moments of the run before it, at another layout, on other data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from model.config import ConfigError
from tests.launch import metrics, train
from training.config import RunConfig, load_config
from training.start_point import find_start_point

MOMENT = "optimizer.state.exp_avg."
REFUSED = [
    # overrides, message
    (["freeze=[vision]"], r"was trained with freeze=\[\]; set it to false, or the same"),
    (["train.precision=bf16"], r"was trained with train.precision=fp32; set it to false"),
    (["lora.rank=4"], r"new adapters have no optimizer state yet; set it to false"),
]
LR, BETA1, BETA2, EPS, DECAY = 1e-3, 0.9, 0.95, 1e-8, 0.1


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint with torch alone."""
    metadata = dcp.FileSystemReader(str(checkpoint / "state")).read_metadata().state_dict_metadata
    state = {
        key: torch.empty(kind.size, dtype=kind.properties.dtype)
        for key, kind in metadata.items()
        if isinstance(kind, TensorStorageMetadata)
    }
    dcp.load(state, checkpoint_id=str(checkpoint / "state"), no_dist=True)
    return state


def test_first_update_is_adams_fourth(config_file: Path, shards: Path, tmp_path: Path) -> None:
    """Three steps of pretraining, then one of another length, layout, mixture and rope base.

    Both moments of every parameter must have been updated with one and the same gradient, from those of the first run;
    and the weights by them, with the bias correction of the fourth update.
    """
    first, second = tmp_path / "run", tmp_path / "next"
    train(config_file, ["train.steps=3"], processes=1)
    options = [
        f"model.init_from={first}",
        "model.preset=tiny_moe",
        "model.init_optimizer=true",
        "model.rope_theta=1000000.0",
        "parallel.expert_model_parallel_size=2",
        f"data.sources=[{{path: {shards}/text}}, {{path: {shards}/images}}]",
        "train.seq_length=256",
        f"train.output_dir={second}",
        "train.steps=1",
        "optimizer.warmup_steps=0",
        "optimizer.decay_style=constant",
        f"optimizer.lr={LR}",
        f"optimizer.beta2={BETA2}",
        f"optimizer.weight_decay={DECAY}",
        "optimizer.overlap_param_gather=false",
    ]
    for overrides, message in REFUSED:
        with pytest.raises(ConfigError, match=message):
            find_start_point(load_config(RunConfig, config_file, [*options, *overrides]))
    output = train(config_file, options)
    assert f"step 0 of 1, from {first}/checkpoints/step_0000003" in output
    [line] = metrics(second)
    assert line["step"] == 1
    before, after = tensors(first / "checkpoints" / "step_0000003"), tensors(second / "checkpoints" / "step_0000001")
    assert before.keys() == after.keys()
    assert json.loads((second / "checkpoints" / "step_0000001" / "train_state.json").read_text())["updates"] == 4
    moved = 0
    for name in [key.removeprefix(MOMENT) for key in before if key.startswith(MOMENT)]:
        moved += check_update(before, after, name)
    assert moved > 0


def check_update(before: Mapping[str, Tensor], after: Mapping[str, Tensor], name: str) -> bool:
    """Compare one parameter with AdamW's formulas in float64. Returns whether it had a gradient."""
    old, new = (
        [state[f"optimizer.state.{kind}.{name}"].double() for kind in ("param", "exp_avg", "exp_avg_sq")]
        for state in (before, after)
    )
    gradient = (new[1] - BETA1 * old[1]) / (1 - BETA1)
    squares = BETA2 * old[2] + (1 - BETA2) * gradient**2
    torch.testing.assert_close(new[2], squares, rtol=1e-3, atol=float(squares.max()) * 1e-5)
    step = (new[1] / (1 - BETA1**4)) / ((new[2] / (1 - BETA2**4)).sqrt() + EPS)
    decay = 0.0 if "norm" in name or name.endswith("bias") else DECAY
    torch.testing.assert_close(new[0] - old[0], -LR * (step + decay * old[0]), rtol=1e-3, atol=2e-7)
    return bool(gradient.abs().max() > 0)


@pytest.mark.fast
def test_moments_of_weights_alone_are_refused(config_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.init_optimizer=true needs model.init_from"):
        load_config(RunConfig, config_file, ["model.init_optimizer=true"])
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text("{}")
    imported = tmp_path / "imported"
    (imported / "state").mkdir(parents=True)
    for folder in (hf, imported):
        options = [f"model.init_from={folder}", "model.init_optimizer=true"]
        with pytest.raises(ConfigError, match=rf"but {folder} holds weights alone; set it to false, or start"):
            find_start_point(load_config(RunConfig, config_file, options))
