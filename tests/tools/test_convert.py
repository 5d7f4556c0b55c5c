"""Folders written by transformers are imported and exported; bad input is refused."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from typer.testing import CliRunner

from model.checkpoint_manifest import file_entry
from model.config import GlmvConfig
from model.weights.folder import SafetensorsFolder
from tests.model.range_server import RangeServer
from tests.model.test_formats import quantise
from tests.tools.converted_folders import CASES, HALF, call, change_tensors, differences, run_python
from tools.convert import app

ROPE_OF_TRANSFORMERS_4 = {
    "partial_rotary_factor": 0.5,
    "rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]},
}


# --- import and export ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_import_then_export_returns_every_bit(case: str, folders: Path) -> None:
    given, exported = (
        load_file(folders / case / "model.safetensors"),
        load_file(folders / "exports" / case / "model.safetensors"),
    )
    assert sorted(exported) == sorted(given)
    for name, tensor in given.items():
        assert exported[name].dtype == tensor.dtype, name
        assert torch.equal(exported[name], tensor), name
    assert differences(folders / case, folders / "exports" / case) == []


@pytest.mark.parametrize("case", CASES)
def test_import_then_export_returns_the_other_files(case: str, folders: Path) -> None:
    """Byte for byte, except that config.json has the older spelling of rope beside the one that it had."""
    given, exported = folders / case, folders / "exports" / case
    assert {path.name for path in exported.iterdir()} == {path.name for path in given.iterdir()} | {"checksums.json"}
    for path in given.iterdir():
        if path.name == "config.json":
            content, expected = (json.loads((folder / path.name).read_text()) for folder in (exported, given))
            old = {key: content["text_config"].pop(key) for key in ("rope_theta", *ROPE_OF_TRANSFORMERS_4)}
            base = GlmvConfig.from_hf(given).decoder.rope_theta
            assert old == {**ROPE_OF_TRANSFORMERS_4, "rope_theta": base}
            if transformers.__version__ < "5.20":  # writes a part of the older spelling itself
                assert expected["text_config"].pop("partial_rotary_factor") == old["partial_rotary_factor"]
            assert content == expected
        elif path.suffix != ".safetensors":
            assert (exported / path.name).read_bytes() == path.read_bytes()
    config_class = transformers.AutoConfig.from_pretrained(given).__class__
    assert config_class.from_pretrained(exported).to_dict() == config_class.from_pretrained(given).to_dict()


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_every_tensor_of_an_export(case: str, folders: Path) -> None:
    model, report = load(folders / "exports" / case)
    assert type(model).__name__ == GlmvConfig.from_hf(folders / case).to_hf()["architectures"][0]
    assert model.dtype == CASES[case][1]
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    input_ids = torch.arange(40, 72)[None]
    given, _ = load(folders / case)
    with torch.no_grad():
        assert torch.equal(model(input_ids=input_ids).logits, given(input_ids=input_ids).logits)


def test_a_flash_stays_a_flash_for_transformers(folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its class, its processors and its rope base, without a word about a type that does not fit the class."""
    exported = folders / "exports/flash_bf16"
    with caplog.at_level("WARNING"):
        transformers.logging.enable_propagation()
        model = transformers.Glm46VForConditionalGeneration.from_pretrained(exported)
        transformers.logging.disable_propagation()
    assert not caplog.records
    assert model.config.model_type == "glm46v"
    assert model.config.text_config.rope_parameters["rope_theta"] == 500_000.0
    assert model.config.text_config.max_position_embeddings == 131_072
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        assert json.loads((exported / name).read_text())["processor_class"] == "Glm46VProcessor"


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    return transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", output_loading_info=True)


def test_export_in_bfloat16_keeps_the_expert_bias_in_float32(folders: Path) -> None:
    given, exported = SafetensorsFolder(folders / "moe_fp32"), SafetensorsFolder(folders / "exports" / HALF)
    assert len(list((folders / "exports" / HALF).glob("model-*-of-*.safetensors"))) > 3
    for name in given.names():
        bias = name.endswith("e_score_correction_bias")
        assert exported.dtype(name) == (torch.float32 if bias else torch.bfloat16)
        assert torch.equal(exported.tensor(name), given.tensor(name).to(exported.dtype(name)))
    assert json.loads((folders / "exports" / HALF / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_fp8_release_becomes_a_plain_folder(folders: Path, tmp_path: Path) -> None:
    """Its config.json says nothing about FP8 any more, and transformers loads every tensor."""
    expected = quantise(folders / "moe_bf16", tmp_path / "fp8", "blocks of 32")
    run_python("-m", "tools.convert", "import", "--hf", str(tmp_path / "fp8"), "--out", str(tmp_path / "checkpoint"))
    export = ("--checkpoint", str(tmp_path / "checkpoint"), "--out", str(tmp_path / "export"))
    run_python("-m", "tools.convert", "export", *export)
    exported = load_file(tmp_path / "export/model.safetensors")
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in expected.items())
    assert "quantization" not in (tmp_path / "export/config.json").read_text()
    _, report = load(tmp_path / "export")
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_commands_as_a_user_types_them(folders: Path, tmp_path: Path) -> None:
    convert = ("-m", "tools.convert")
    run_python(*convert, "import", "--hf", str(folders / "dense_fp32"), "--out", str(tmp_path / "checkpoint"))
    run_python(*convert, "export", "--checkpoint", str(tmp_path / "checkpoint"), "--out", str(tmp_path / "export"))
    verified = CliRunner().invoke(app, ["verify", str(folders / "dense_fp32"), str(tmp_path / "export")])
    assert verified.exit_code == 0
    assert verified.stdout == "equal: 82 tensors bit for bit, and all other files\n"


def test_import_from_a_url_equals_that_of_the_folder(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a folder with checksums, which an export writes: they are compared with what the server sends."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = shutil.copytree(folders / "exports" / HALF, tmp_path / "model")
    local = call(["import", "--hf", str(folder), "--out", str(tmp_path / "local")])
    with RangeServer(folder) as server:
        server.signature = "sig=secret"
        arguments = ["import", "--hf", f"{server.url}?sig=secret", "--out"]
        status, output, errors = call([*arguments, str(tmp_path / "remote")])
        assert (status, local[0]) == (0, 0), errors
        assert f"imported {server.url} into" in output
        assert "secret" not in output
        files = [path.relative_to(tmp_path / "local") for path in (tmp_path / "local").rglob("*") if path.is_file()]
        assert len(files) > 5
        for file in files:
            assert (tmp_path / "remote" / file).read_bytes() == (tmp_path / "local" / file).read_bytes(), file

        weights = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        status, _, errors = call([*arguments, str(tmp_path / "damaged")])
        assert status == 2
        assert errors.startswith(f"error: {server.url}/{weights.name} is damaged: tensor ")
        status, _, errors = call(["verify", server.url, str(folder)])
        assert (status, errors.startswith(f"error: {server.url.replace('//', '/')} is a URL: give a folder")) == (
            2,
            True,
        )


# --- bad input --------------------------------------------------------------------------------------------------------


class Foreign:
    """Unpickling this would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('a foreign class was called')",)


def plant_foreign_class(root: Path) -> list[str]:
    """Plant it as someone would who can also write the manifest."""
    path, manifest = root / "checkpoint/state/.metadata", root / "checkpoint/manifest.json"
    path.write_bytes(pickle.dumps(Foreign()))
    content = json.loads(manifest.read_text())
    content["files"]["state/.metadata"] = file_entry(path)
    manifest.write_text(json.dumps(content))
    return ["export", "--checkpoint", str(root / "checkpoint")]


def another_architecture(root: Path) -> list[str]:
    content = json.loads((root / "hf/config.json").read_text())
    (root / "hf/config.json").write_text(json.dumps({**content, "model_type": "qwen2_vl"}))
    return ["import", "--hf", str(root / "hf")]


def weights_of_another_size(root: Path) -> list[str]:
    content = json.loads((root / "hf/config.json").read_text())
    content["text_config"]["num_hidden_layers"] = 3
    (root / "hf/config.json").write_text(json.dumps(content))
    return ["import", "--hf", str(root / "hf")]


def no_weights(root: Path) -> list[str]:
    (root / "hf/model.safetensors").unlink()
    return ["import", "--hf", str(root / "hf")]


def full_output(root: Path) -> list[str]:
    (root / "out").mkdir()
    (root / "out/thesis.tex").touch()
    return ["import", "--hf", str(root / "hf")]


def no_hf_files(root: Path) -> list[str]:
    shutil.rmtree(root / "checkpoint/hf")
    return ["export", "--checkpoint", str(root / "checkpoint")]


def bridge_folder(root: Path) -> Path:
    """Make what Megatron-Bridge leaves: pickled state and its configuration beside files of megatron-core's format."""
    folder = root / "bridge" / "iter_0000100"
    folder.mkdir(parents=True)
    shutil.copy(root / "checkpoint/state/.metadata", folder)
    for name in ("__0_0.distcp", "common.pt", "run_config.yaml"):
        (folder / name).write_bytes(b"not even opened")
    return folder


def bridge_import(root: Path) -> list[str]:
    return ["import", "--hf", str(bridge_folder(root))]


def bridge_export(root: Path) -> list[str]:
    return ["export", "--checkpoint", str(bridge_folder(root).parent)]


def megatron_import(root: Path) -> list[str]:
    (bridge_folder(root) / "run_config.yaml").unlink()
    return ["import", "--hf", str(root / "bridge")]


def pickled(root: Path) -> list[str]:
    (root / "hf/model.safetensors").rename(root / "hf/pytorch_model.bin")
    return ["import", "--hf", str(root / "hf")]


def not_finite(root: Path) -> list[str]:
    change_tensors(root / "hf", lambda tensors: tensors["model.visual.downsample.bias"][7].fill_(torch.nan))
    return ["import", "--hf", str(root / "hf")]


def damaged_checkpoint(root: Path) -> list[str]:
    file = root / "checkpoint/state/__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[-10_000] ^= 1  # a bit of a mantissa
    file.write_bytes(content)
    return ["export", "--checkpoint", str(root / "checkpoint")]


REFUSED: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "another architecture": (
        another_architecture,
        "model_type 'qwen2_vl' is not a GLM-V model; accepted: glm4v_moe (Glm4vMoeForConditionalGeneration), "
        "glm4v (Glm4vForConditionalGeneration), glm46v (Glm46VForConditionalGeneration)",
    ),
    "weights of another size": (weights_of_another_size, "unknown: model.language_model.layers.3."),
    "no weights": (no_weights, "has neither model.safetensors nor model.safetensors.index.json"),
    "an output that is not empty": (full_output, "exists and is not empty: choose another --out, or remove it"),
    "no folder": (lambda root: ["import", "--hf", str(root / "nowhere")], "nowhere has no config.json"),
    "a foreign class": (plant_foreign_class, "names builtins.exec"),
    "no checkpoint": (lambda root: ["export", "--checkpoint", str(root / "hf")], "hf is no checkpoint"),
    "no hf files": (no_hf_files, "is missing; use another step"),
    "an unknown dtype": (
        lambda root: ["export", "--checkpoint", str(root / "checkpoint"), "--dtype", "fp8"],
        "--dtype fp8 is unknown: use bf16, fp32 or keep",
    ),
    "an unknown verification": (
        lambda root: ["export", "--checkpoint", str(root / "checkpoint"), "--verify", "none"],
        "--verify none is unknown: use full or sizes",
    ),
    "a checkpoint of Megatron-Bridge": (bridge_import, "of Megatron-Bridge, which is not read: export it first, with"),
    "a run of Megatron-Bridge": (bridge_export, "it is a checkpoint of Megatron-Bridge, which is not read"),
    "a run of Megatron-LM": (megatron_import, "it is a checkpoint of Megatron-LM or another trainer on Megatron-Core"),
    "pickled weights": (pickled, "pytorch_model.bin would be unpickled, which runs whatever code a file names"),
    "weights that are not finite": (
        not_finite,
        "tensor model.visual.downsample.bias has values that are not finite (NaN or infinity)",
    ),
    "a damaged checkpoint": (damaged_checkpoint, "__0_0.distcp is damaged: tensor "),
    "a file that is not a folder": (
        lambda root: ["import", "--hf", str(root / "hf" / "config.json")],
        "config.json has no config.json",
    ),
    "a wrong shard size": (
        lambda root: ["export", "--checkpoint", str(root / "checkpoint"), "--max-shard-size", "big"],
        "--max-shard-size: 'big' is not a size: write it as 5GB",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_line(case: str, folders: Path, tmp_path: Path) -> None:
    make_bad, message = REFUSED[case]
    shutil.copytree(folders / "moe_fp32", tmp_path / "hf")
    shutil.copytree(folders / "checkpoints/moe_fp32", tmp_path / "checkpoint")
    arguments = make_bad(tmp_path)
    before = sorted((tmp_path / "out").iterdir()) if (tmp_path / "out").exists() else None
    arguments += ["--out", str(tmp_path / "out")]
    status, output, error = call(arguments)
    assert status == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert "was called" not in output + error
    after = sorted((tmp_path / "out").iterdir()) if (tmp_path / "out").exists() else None
    assert after == before


# --- a disk that is full ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["import", "export"])
def test_full_disk_is_one_line_and_leaves_nothing(command: str, folders: Path, tmp_path: Path) -> None:
    """No file may be larger than 500 kB: the weights do not fit."""
    source = {
        "import": ("--hf", str(folders / "dense_fp32")),
        "export": ("--checkpoint", str(folders / "checkpoints/dense_fp32")),
    }[command]
    (tmp_path / ".unfinished_out").mkdir()  # of an earlier call that was killed
    done = subprocess.run(
        [sys.executable, "-m", "tools.convert", command, *source, "--out", str(tmp_path / "out")],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)),
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: cannot write ")
    assert f"{tmp_path}/out: " in line
    assert "File too large" in line
    assert f"GB free at {tmp_path}" in line
    assert list(tmp_path.iterdir()) == []


# --- help -------------------------------------------------------------------------------------------------------------


def test_help_keeps_the_lines_of_examples() -> None:
    shown = CliRunner().invoke(app, ["--help"], terminal_width=80).stdout.splitlines()
    assert "      python -m tools.convert import --hf DIR_OR_URL --out CKPT" in shown
    assert "      python -m tools.convert verify DIR_A DIR_B [--logits [--tolerance T]]" in shown


@pytest.mark.parametrize("command", ["import", "export", "assemble", "inspect", "verify"])
def test_help_explains_every_option_with_its_default(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"], terminal_width=200).stdout
    options = [line for line in shown.split("Options:")[1].splitlines() if line.strip() and "--help" not in line]
    for line in options:
        assert re.fullmatch(r"  (--)?\S+ (<\w+>)? +\S.{15,}  \[(required|default: \S+)\]", line), line
