"""tools.convert inspect: numbers of a checkpoint and of Hugging Face folders, against safetensors and each other."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from model.checkpoint import TrainState
from tests.hf_folders import save_whole_folder
from tests.launch import ROOT
from tools.convert import app
from tools.inspection import inspect_folder

PREFIXES = {
    "vision": ("model.visual.",),
    "adapter": ("model.visual.merger.",),
    "decoder": ("model.language_model.", "lm_head."),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `hf` as transformers writes it, in bfloat16, and its `checkpoint`."""
    root = tmp_path_factory.mktemp("inspected")
    save_whole_folder("glm4v_moe", root / "hf", dtype=torch.bfloat16)
    command = [sys.executable, "-m", "tools.convert", "import"]
    options = ["--hf", str(root / "hf"), "--out", str(root / "checkpoint")]
    subprocess.run([*command, *options], cwd=ROOT, check=True, capture_output=True)
    return root


def inspect(path: Path, *options: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["inspect", str(path), "--json", *options])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_parts_of_a_folder_are_counted_as_safetensors_has_them(folders: Path) -> None:
    found = inspect(folders / "hf")
    tensors = load_file(folders / "hf/model.safetensors")
    router = {name for name in tensors if ".mlp.gate." in name}
    expected = {part: {name for name in tensors if name.startswith(start)} for part, start in PREFIXES.items()}
    expected["vision"] -= expected["adapter"]
    expected["decoder"] -= router
    expected["router"] = router
    for part, names in expected.items():
        assert found["parts"][part]["tensors"] == len(names)
        assert found["parts"][part]["values"] == sum(tensors[name].numel() for name in names)
        assert found["parts"][part]["bytes"] == sum(tensors[name].nbytes for name in names)
    assert found["parts"]["router"]["dtypes"] == ["bfloat16", "float32"]
    assert found["all"]["values"] == sum(tensor.numel() for tensor in tensors.values())
    assert found["files"]["model.safetensors"]["bytes"] == (folders / "hf/model.safetensors").stat().st_size


def test_checkpoint_holds_the_same_parts(folders: Path) -> None:
    hf, checkpoint = inspect(folders / "hf"), inspect(folders / "checkpoint")
    for part in (*PREFIXES, "router"):
        for key in ("values", "bytes", "dtypes"):
            assert checkpoint["parts"][part][key] == hf["parts"][part][key], (part, key)
    assert checkpoint["format"] == "torch_dist"
    assert checkpoint["kind"] == "checkpoint, weights alone"
    assert "float32" in checkpoint["all"]["dtypes"]
    manifest = json.loads((folders / "checkpoint/manifest.json").read_text())
    assert set(checkpoint["files"]) == {*manifest["files"], "manifest.json"}
    assert checkpoint["checksums"]["files"].startswith(f"{len(manifest['files'])}, xxh3_64")


def test_equal_layers_and_experts_are_one_node_of_the_tree(folders: Path) -> None:
    tree = {node["name"]: node for node in inspect(folders / "hf")["tree"]}
    (language,) = (node for node in tree["model"]["children"] if node["name"] == "language_model")
    (layers,) = (node for node in language["children"] if node["name"] == "layers")
    assert [(node["name"], node["times"]) for node in layers["children"]] == [("0", 1), ("1-3", 3)]
    mlp = next(node for node in layers["children"][1]["children"] if node["name"] == "mlp")
    experts = next(node for node in mlp["children"] if node["name"] == "experts")
    assert [(node["name"], node["times"]) for node in experts["children"]] == [("0-7", 8)]
    tensors = load_file(folders / "hf/model.safetensors")
    assert experts["values"] == sum(tensor.numel() for name, tensor in tensors.items() if ".experts." in name)
    assert layers["values"] == sum(node["values"] for node in layers["children"])


def test_layer_of_another_shape_is_not_joined(folders: Path, tmp_path: Path) -> None:
    tensors = load_file(folders / "hf/model.safetensors")
    tensors["model.language_model.layers.2.input_layernorm.weight"] = torch.zeros(127)
    save_file(tensors, tmp_path / "model.safetensors")
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path)]).stdout
    assert "1-3 (3 times)" not in shown
    assert [line.split()[0] for line in shown.splitlines() if line.startswith("      ") and line.split()[0].isdigit()][
        :4
    ] == ["0", "1", "2", "3"]


def test_run_folder_shows_step_layout_and_how_it_stands(folders: Path, tmp_path: Path) -> None:
    for step in (3, 6):
        checkpoint = tmp_path / f"checkpoints/step_{step:07d}"
        shutil.copytree(folders / "checkpoint", checkpoint)
        config = {"train": {"steps": 9}, "parallel": {"tensor_model_parallel_size": 2, "vision": "images"}}
        (checkpoint / "train_state.json").write_text(json.dumps(vars(TrainState(step=step, config=config))))
    (tmp_path / "checkpoints/latest").write_text("step_0000006\n")
    (tmp_path / "state.json").write_text(json.dumps({"state": "running", "step": 7, "steps": 9}))
    found = inspect(tmp_path)
    assert found["path"].endswith("step_0000006")
    assert found["step"] == "6 of 9"
    assert found["layout"] == "tensor 2, vision images"
    assert found["run"] == "2 checkpoints, step_0000003 to step_0000006; running at step 7 of 9"
    assert found["kind"] == "checkpoint of a run"


def test_checksums_of_tensors_are_listed(folders: Path, tmp_path: Path) -> None:
    hf = shutil.copytree(folders / "hf", tmp_path / "hf")
    entry = {"dtype": "bfloat16", "shape": [2048, 128], "xxh3_64": "0123456789abcdef"}
    (hf / "checksums.json").write_text(json.dumps({"tensors": {"lm_head.weight": entry}}))
    found = inspect(hf, "--tensors")
    assert found["checksums"] == {"tensors": "1, xxh3_64"}
    assert found["tensors"]["lm_head.weight"]["checksum"] == "xxh3_64:0123456789abcdef"
    assert len(found["tensors"]) == found["all"]["tensors"]


def test_checksums_of_an_imported_checkpoint_are_those_of_the_given_tensors(folders: Path) -> None:
    found = inspect(folders / "checkpoint", "--tensors")
    given = load_file(folders / "hf/model.safetensors")
    expected = {
        name: f"xxh3_64:{xxhash.xxh3_64_hexdigest(tensor.view(-1).view(torch.uint8).numpy().tobytes())}"
        for name, tensor in given.items()
    }
    assert found["tensor_checksums"] == expected
    assert found["checksums"]["tensors"] == f"{len(given)}, xxh3_64"
    shown = CliRunner().invoke(app, ["inspect", str(folders / "checkpoint"), "--tensors"]).stdout
    assert all(checksum.removeprefix("xxh3_64:") in shown for checksum in expected.values())


# --- what does not fit together ---------------------------------------------------------------------------------------


def lose_a_file(root: Path) -> Path:
    (root / "checkpoint/hf/tokenizer.json").unlink()
    return root / "checkpoint"


def truncate_tensors(root: Path) -> Path:
    file = root / "checkpoint/state/__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-10])
    return root / "checkpoint"


def truncate_safetensors(root: Path) -> Path:
    file = root / "hf/model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    return root / "hf"


def lose_a_shard(root: Path) -> Path:
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors", "x": "model.safetensors"}}
    (root / "hf/model.safetensors.index.json").write_text(json.dumps(index))
    (root / "hf/model.safetensors").rename(root / "hf/model-00002-of-00002.safetensors")
    return root / "hf"


PROBLEMS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a lost file": (lose_a_file, "problem: hf/tokenizer.json is missing, which manifest.json names"),
    "a truncated file": (truncate_tensors, "bytes, and manifest.json says"),
    "a truncated shard": (truncate_safetensors, "problem: model.safetensors cannot be read as safetensors"),
    "a lost shard": (lose_a_shard, "problem: model-00001-of-00002.safetensors is missing, which model.safetensors"),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_problems_are_named(case: str, folders: Path, tmp_path: Path) -> None:
    damage, message = PROBLEMS[case]
    shutil.copytree(folders, tmp_path / "copy")
    result = CliRunner().invoke(app, ["inspect", str(damage(tmp_path / "copy"))])
    assert result.exit_code == 1
    assert message in result.stdout


class Foreign:
    """Unpickling this would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('a foreign class was called')",)


def test_foreign_class_is_not_unpickled(folders: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(folders / "checkpoint", tmp_path / "checkpoint")
    (checkpoint / "state/.metadata").write_bytes(pickle.dumps(Foreign()))
    result = CliRunner().invoke(app, ["inspect", str(checkpoint)])
    assert result.exit_code == 2
    assert "names builtins.exec" in result.stderr


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_other_folders_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / name)])
    assert result.exit_code == 2
    assert "is neither a checkpoint (state/), nor a run's folder (checkpoints/), nor a Hugging Face" in result.stderr


def test_megatron_is_not_imported(folders: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tools.inspection import inspect_folder\n"
        "inspect_folder(Path(sys.argv[1])); print('megatron.core' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, folders / "checkpoint"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_values_of_a_file_that_is_not_counted_are_a_problem(folders: Path, tmp_path: Path) -> None:
    index = {"weight_map": dict.fromkeys(load_file(folders / "hf/model.safetensors"), "model-1.safetensors")}
    shutil.copyfile(folders / "hf/model.safetensors", tmp_path / "model-1.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert inspect_folder(tmp_path).problems == []
    shutil.copyfile(folders / "hf/model.safetensors", tmp_path / "model.safetensors")
    (problem,) = inspect_folder(tmp_path).problems
    assert problem.startswith("model.safetensors is beside model.safetensors.index.json")
