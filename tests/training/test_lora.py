"""A run with adapters: it resumes bit for bit, exports to PEFT, merges, and refuses what contradicts it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from common.files import write_json
from model.checkpoint import HF_FILES, find_checkpoint, load_checkpoint
from model.config import ConfigError, GlmvConfig
from model.errors import CheckpointError
from model.hf_config import CONFIG_FILE
from model.lora import add_adapters
from model.lora_config import LoraConfig
from model.weights.load import SafetensorsFolder
from model.whole_model import build_whole_model
from tests.launch import metrics, train
from tests.reference import (
    Image,
    Text,
    forward_inputs,
    make_sample,
    pack,
    small_config,
    transformers_logits,
    transformers_model,
)
from tests.tools.test_convert import run_python
from tests.training.run_folders import interrupted_run
from tools.lora_output import AdapterCheckpoint, adapter_config, export_lora, merge, read_adapter_checkpoint
from training.config import RunConfig, load_config
from training.lora_base import check_lora
from training.replay import prepare_replay
from training.start_point import StartPoint, find_start_point

EXPERTS_OVER_TWO = ["parallel.expert_model_parallel_size=2"]
COMMON = [*EXPERTS_OVER_TWO, "train.precision=fp32", "train.deterministic=true"]
LORA = ["lora.rank=4", "lora.alpha=32", "lora.targets=[all-linear,experts.*]"]
SAME = ("step", "loss", "grad_norm", "lr")

# A conversion forks, which the threads of pytest's process group do not survive: it runs in its own process.
CONVERT = """
import sys
from pathlib import Path
from tools.conversion import export_checkpoint
from tools.lora_output import export_lora, merge

if __name__ == "__main__":
    run, base = map(Path, sys.argv[1:])
    export_lora(run, Path("peft"))
    merge(run, Path("merged"))
    export_checkpoint(base, Path("base"))
"""


def trace(run: Path) -> list[list[object]]:
    return [[line[key] for key in SAME] for line in metrics(run)]


def stored(run: Path) -> dict[str, object]:
    files = json.loads((run / "checkpoints" / "step_0000006" / "manifest.json").read_text())["files"]
    return {name: entry for name, entry in files.items() if name.endswith(".distcp")}


def test_adapters_resume_export_and_merge(
    config_file: Path, undisturbed: Callable[..., Path], single_process: None, tmp_path: Path
) -> None:
    """One test, because each run takes many seconds."""
    base, whole = undisturbed(config_file, *COMMON), tmp_path / "whole"
    common = [*COMMON, *LORA, f"model.init_from={base}"]
    train(config_file, [*common, f"train.output_dir={whole}"])

    resumed = tmp_path / "resumed"
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step_0000006")
    (resumed / "checkpoints" / "latest").write_text("step_0000003\n")
    train(config_file, [*common, f"train.output_dir={resumed}", "checkpoint.async_save=true"])
    assert trace(resumed) == trace(whole)
    assert stored(resumed) == stored(whole)
    size_of = {run: sum(f.stat().st_size for f in (run / "checkpoints").rglob("*.distcp")) for run in (base, whole)}
    assert size_of[whole] < size_of[base]  # two checkpoints of adapters, one of everything

    script = tmp_path / "convert.py"
    script.write_text(CONVERT)
    run_python(str(script), str(whole), str(base), cwd=tmp_path)
    ours = logits(whole, tmp_path / "base")
    model = load(tmp_path / "base")
    sample = sample_for(tmp_path / "base")
    with torch.no_grad():
        without = transformers_logits(model, sample)
        adapted: Any = peft.PeftModel.from_pretrained(model, str(tmp_path / "peft"))
        with_adapters = transformers_logits(adapted.base_model.model, sample)
        assert (with_adapters - without).abs().max() > 1e-2
        assert (with_adapters - ours).abs().max() <= 1e-5
        merged = load(tmp_path / "merged")
        assert (transformers_logits(merged, sample) - ours).abs().max() <= 1e-5
        expected = dict(adapted.merge_and_unload().named_parameters())
    for name, weight in merged.named_parameters():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-7)


def logits(run: Path, base: Path) -> torch.Tensor:
    """Return this model's logits of the sample, with the adapters of a run."""
    checkpoint, config = find_checkpoint(run), GlmvConfig.from_hf(base)
    model = build_whole_model(config, SafetensorsFolder(base)).eval()
    add_adapters(model, read_adapter_checkpoint(checkpoint).lora)
    load_checkpoint(checkpoint, [model])
    sample = sample_for(base)
    with torch.no_grad():
        return model(**forward_inputs(pack([sample], 48)))[: len(sample.encoded.input_ids)]


def load(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()


def sample_for(folder: Path) -> Any:
    return make_sample(GlmvConfig.from_hf(folder), [Text(9), Image(4, 6), Text(20)], seed=3)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("variant", "targets", "expected"),
    [("glm4v", "all-linear", 0.25), ("glm4v_moe", "o_proj", 0.25), ("glm4v_moe", "all-linear", 0.0)],
)
def test_exported_dropout_is_what_peft_accepts(variant: str, targets: str, expected: float) -> None:
    """PEFT has no dropout for parameters, as which a mixture of experts' other MLPs are exported."""
    model, lora = small_config(variant), LoraConfig(rank=2, dropout=0.25, targets=[targets])
    found = adapter_config(AdapterCheckpoint(Path(), model, lora, init_from="", seed=1, base="base"))
    adapted = peft.get_peft_model(transformers_model(model), peft.LoraConfig(**found))
    assert adapted.peft_config["default"].lora_dropout == expected


# --- what is refused --------------------------------------------------------------------------------------------------


def start_point(config_file: Path, *overrides: str) -> StartPoint:
    return find_start_point(load_config(RunConfig, config_file, overrides))


def checked(config_file: Path, *overrides: str) -> None:
    check_lora(load_config(RunConfig, config_file, overrides), GlmvConfig.from_preset("tiny_moe"))


CONTRADICTIONS = [
    (["lora.targets=[q_pro]"], r"lora\.targets: 'q_pro' matches nothing in this model; it has .*self_attn\.q_proj"),
    (["lora.targets=[gate]"], "'gate' matches nothing"),  # the router
    (["freeze=[decoder]"], r"freeze=\['decoder'\] and lora\.targets=.* contradict each other.*remove it from freeze"),
    (["freeze=[vision]", "lora.targets=[attn.qkv]"], r"freeze=\['vision'\] and lora\.targets"),
    (
        ["lora.targets=[experts.*]", "parallel.expert_tensor_parallel_size=2"],
        r"set parallel\.expert_tensor_parallel_size=1",
    ),
    (
        ["lora.dropout=0.1", "lora.targets=[experts.*]"],
        r"lora\.dropout=0\.1 and lora\.targets=.*no experts in lora\.tar",
    ),
    (["lora.dropout=1"], r"lora\.dropout=1\.0: give 0, or a number from 0\.0001 to 0\.9999"),
    (["lora.dropout=-0.1"], r"lora\.dropout=-0\.1: give 0, or"),
    (["lora.dropout=0.000001"], r"lora\.dropout=1e-06: give 0, or"),
    (["lora.dropout=nan"], r"lora\.dropout=nan: give 0, or"),
    (["lora.alpha=0"], r"lora\.alpha=0\.0: give a positive number"),
    (["lora.rank=-1"], r"lora\.rank=-1: give a positive number, or 0"),
    (["lora.targets=[]"], r"lora\.targets is empty"),
    (["lora.targets=[q_proj,q_proj]"], r"names 'q_proj' twice"),
]


@pytest.mark.fast
@pytest.mark.parametrize(("overrides", "message"), CONTRADICTIONS)
def test_contradiction_is_refused(config_file: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked(config_file, "lora.rank=4", *overrides)


@pytest.mark.fast
def test_freezing_what_has_no_adapters_is_allowed(config_file: Path) -> None:
    checked(config_file, "lora.rank=4", "freeze=[vision,adapter]")


def saved_adapters(config_file: Path, folder: Path, *overrides: str, base: str = "random weights of seed 1234") -> Path:
    """Make a run folder with the train state of adapters, and return its step folder."""
    interrupted_run(config_file, folder, "lora.rank=4", *overrides)
    step = folder / "checkpoints" / "step_0000003"
    state = json.loads((step / "train_state.json").read_text())
    (step / "train_state.json").write_text(json.dumps({**state, "base": base}))
    (step / "state").mkdir()
    return step


@pytest.mark.fast
def test_other_adapters_or_another_base_are_refused_on_resume(config_file: Path, tmp_path: Path) -> None:
    step = saved_adapters(config_file, tmp_path / "run")
    assert start_point(config_file, "lora.rank=4").resume == step
    for overrides, message in (
        (["lora.rank=8"], r"lora\.rank was 4 .* and is 8 now"),
        (["lora.rank=0"], r"lora\.rank was 4 .* and is 0 now"),
        (["lora.rank=4", "lora.targets=[q_proj]"], r"lora\.targets was .* and is \['q_proj'\] now"),
        (["lora.rank=4", "train.seed=5"], "another base model .*: found random weights of seed 5, not .* seed 1234"),
    ):
        with pytest.raises(ConfigError, match=message):
            start_point(config_file, *overrides, "checkpoint.allow_changes=true")
    with pytest.raises(ConfigError, match=r"lora\.alpha was 16.* and is 8"):
        start_point(config_file, "lora.rank=4", "lora.alpha=8")


@pytest.mark.fast
def test_adapters_cannot_be_added_to_a_run_that_has_none(config_file: Path, tmp_path: Path) -> None:
    interrupted_run(config_file, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"lora\.rank was 0 .* and is 4 now"):
        start_point(config_file, "lora.rank=4")


@pytest.mark.fast
def test_adapters_are_no_weights_to_start_from(config_file: Path, tmp_path: Path) -> None:
    step = saved_adapters(config_file, tmp_path / "adapters")
    with pytest.raises(ConfigError, match=r"holds only the adapters of a LoRA run: .*tools\.convert merge"):
        start_point(config_file, f"model.init_from={step}")


@pytest.mark.fast
def test_base_model_that_has_moved_is_accepted_and_another_is_not(
    config_file: Path, hf_folder: tuple[Path, Any], tmp_path: Path
) -> None:
    folder = hf_folder[0]
    options = ["lora.rank=4", "model.preset=''"]
    fingerprint = start_point(config_file, *options, f"model.init_from={folder}").base
    moved, other = tmp_path / "moved", tmp_path / "other"
    for copied in (moved, other):
        shutil.copytree(folder, copied)
    tensors = load_file(other / "model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, other / "model.safetensors")
    saved_adapters(config_file, tmp_path / "run", *options[1:], f"model.init_from={folder}", base=fingerprint)
    found = start_point(config_file, *options, f"model.init_from={moved}")
    assert found.weights == moved
    assert any("model.init_from has moved" in line for line in found.moved)
    with pytest.raises(ConfigError, match=f"model.init_from={other} is another base model than the one"):
        start_point(config_file, *options, f"model.init_from={other}")


@pytest.mark.fast
def test_base_model_is_compared_where_adapters_are_merged_or_replayed(config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    step = saved_adapters(config_file, run)
    (step / HF_FILES).mkdir()
    write_json(step / HF_FILES / CONFIG_FILE, GlmvConfig.from_preset("tiny_moe").to_hf())
    with pytest.raises(ConfigError, match=r"the base model is not found: .*say with --base where it is now"):
        merge(step, tmp_path / "out", base=str(tmp_path / "none"))
    shutil.copy(config_file, run / "config.yaml")
    with pytest.raises(ConfigError, match=r"another base model .*: found random weights of seed 5"):
        prepare_replay(run, 5, overrides=["lora.rank=4", "train.seed=5"])
    with pytest.raises(ConfigError, match=r"lora\.rank was 4 .* and is 8 now"):
        prepare_replay(run, 5, overrides=["lora.rank=8"])


@pytest.mark.fast
def test_commands_name_each_other(config_file: Path, tmp_path: Path) -> None:
    step = saved_adapters(config_file, tmp_path / "run", base="")
    for command in (export_lora, merge):
        with pytest.raises(CheckpointError, match="holds a whole model, no adapters: use "):
            command(step, tmp_path / "out")


def test_adapter_checkpoint_needs_its_configuration(config_file: Path, tmp_path: Path) -> None:
    step = saved_adapters(config_file, tmp_path / "run")
    state = json.loads((step / "train_state.json").read_text())
    (step / "train_state.json").write_text(json.dumps({**state, "config": {}}))
    with pytest.raises(CheckpointError, match="is damaged"):
        read_adapter_checkpoint(step)
