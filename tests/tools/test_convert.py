"""Folders written by transformers are imported, exported and compared; bad input is refused."""

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
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from model.checkpoint_manifest import file_entry
from model.config import GlmvConfig
from model.weights.folder import SafetensorsFolder
from tests.hf_folders import save_whole_folder
from tests.model.range_server import RangeServer
from tests.model.test_formats import quantise
from tools.comparison import TensorDifference, compare_files, compare_tensors, open_sides
from tools.convert import app
from tools.exported import Exported
from tools.probe import TEXT

CASES = {
    "moe_fp32": ("glm4v_moe", torch.float32),
    "moe_bf16": ("glm4v_moe", torch.bfloat16),
    "dense_fp32": ("glm4v", torch.float32),
    "flash_bf16": ("glm46v", torch.bfloat16),
}
# Files that published folders may have beside those that the tests write. No test reads them.
OTHER_FILES = (
    "generation_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
)
HALF = "moe_fp32_exported_as_bf16"
ROPE_OF_TRANSFORMERS_4 = {
    "partial_rotary_factor": 0.5,
    "rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]},
}

# A conversion starts and ends a process group, of which a test session has only one: it runs in its own process.
CONVERT = """
from pathlib import Path
from tools.conversion import export_checkpoint, import_folder

if __name__ == "__main__":
    for case in {cases}:
        import_folder(Path(case), Path("checkpoints", case))
        export_checkpoint(Path("checkpoints", case), Path("exports", case))
    export_checkpoint(Path("checkpoints/moe_fp32"), Path("exports/{half}"), dtype="bf16", max_shard_bytes=1_000_000)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as transformers writes them, their checkpoints under checkpoints/ and their exports under exports/."""
    root = tmp_path_factory.mktemp("folders")
    for case, (variant, dtype) in CASES.items():
        save_whole_folder(variant, root / case, dtype=dtype)
    for name in OTHER_FILES:
        (root / "flash_bf16" / name).write_text('{"kept": "byte for byte"}\n')
    script = root / "convert.py"
    script.write_text(CONVERT.format(cases=list(CASES), half=HALF))
    run_python(str(script), cwd=root)
    return root


def run_python(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    repository = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd or repository,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=True,
    )


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


# --- verify -----------------------------------------------------------------------------------------------------------


def test_import_from_a_url_equals_that_of_the_folder(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a folder with checksums, which an export writes: they are compared with what the server sends."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = shutil.copytree(folders / "exports" / HALF, tmp_path / "model")
    local = call(["import", "--hf", str(folder), "--out", str(tmp_path / "local")], new_process=False)
    with RangeServer(folder) as server:
        server.signature = "sig=secret"
        arguments = ["import", "--hf", f"{server.url}?sig=secret", "--out"]
        status, output, errors = call([*arguments, str(tmp_path / "remote")], new_process=False)
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
        status, _, errors = call([*arguments, str(tmp_path / "damaged")], new_process=False)
        assert status == 2
        assert errors.startswith(f"error: {server.url}/{weights.name} is damaged: tensor ")
        status, _, errors = call(["verify", server.url, str(folder)], new_process=False)
        assert (status, errors.startswith(f"error: {server.url.replace('//', '/')} is a URL: give a folder")) == (
            2,
            True,
        )


def differences(a: Path, b: Path) -> list[TensorDifference | tuple[str, str, str]]:
    sides = open_sides(a, b)
    return [*compare_tensors(*sides), *compare_files(*(side.files for side in sides))]


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_value(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.visual.downsample.bias"][5] += 0.25


def remove_tensor(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["lm_head.weight"]


def change_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.visual.downsample.bias"] = tensors["model.visual.downsample.bias"].view(2, 64)


def change_dtype(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].half()


def change_theta(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    content["text_config"]["rope_parameters"]["rope_theta"] = 1e6
    (folder / "config.json").write_text(json.dumps(content))


DIFFERENCES: dict[str, tuple[Callable[[Path], object], TensorDifference | tuple[str, str, str]]] = {
    "a value": (
        lambda folder: change_tensors(folder, change_value),
        TensorDifference("model.visual.downsample.bias", "1 of 128 values differ", 0.25),
    ),
    "a missing tensor": (
        lambda folder: change_tensors(folder, remove_tensor),
        TensorDifference("lm_head.weight", "is only in {given}", None),
    ),
    "a shape": (
        lambda folder: change_tensors(folder, change_shape),
        TensorDifference("model.visual.downsample.bias", "is [128] and [2, 64]", None),
    ),
    "a dtype": (
        lambda folder: change_tensors(folder, change_dtype),
        TensorDifference("lm_head.weight", "is float32 and float16; {count} of 262,144 values differ", 0.0),
    ),
    "a setting": (change_theta, ("config.json: text_config.rope_theta", "10000.0", "1000000.0")),
    "a missing file": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        ("tokenizer.json", "present", "missing"),
    ),
    "another template": (
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
        ("chat_template.jinja", "bytes differ", "bytes differ"),
    ),
}


@pytest.mark.parametrize("case", DIFFERENCES)
def test_verify_reports_the_difference(case: str, folders: Path, tmp_path: Path) -> None:
    change, expected = DIFFERENCES[case]
    given, changed = folders / "moe_fp32", shutil.copytree(folders / "moe_fp32", tmp_path / "changed")
    change(changed)
    (found,) = differences(given, changed)
    if isinstance(expected, TensorDifference):
        largest = expected.largest
        if case == "a dtype":
            tensor = load_file(given / "model.safetensors")["lm_head.weight"]
            rounding = (tensor.double() - tensor.half().double()).abs()
            largest, count = rounding.max().item(), f"{int((rounding > 0).sum()):,}"
            expected = replace(expected, what=expected.what.format(count=count))
        expected = replace(expected, what=expected.what.format(given=given), largest=largest)
    assert found == expected
    result = CliRunner().invoke(app, ["verify", str(given), str(changed)])
    assert result.exit_code == 1
    assert "differences: 1 (1 shown)" in result.stdout


def test_verify_shows_the_largest_difference_first(folders: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(folders / "moe_fp32", tmp_path / "changed")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.visual.downsample.bias"][3] += 0.125
        tensors["lm_head.weight"][-1, -1] += 2  # in the last block of rows
        tensors["model.visual.merger.proj.weight"][0, 0] = torch.nan

    change_tensors(changed, change)
    found = differences(folders / "moe_fp32", changed)
    names = [each.name for each in found if isinstance(each, TensorDifference)]
    assert names == ["model.visual.merger.proj.weight", "lm_head.weight", "model.visual.downsample.bias"]
    shown = CliRunner().invoke(app, ["verify", str(folders / "moe_fp32"), str(changed)]).stdout.splitlines()
    assert [line.split()[1] for line in shown[1:4]] == ["nan", "2", "0.125"]


def test_verify_distinguishes_minus_zero_from_zero(folders: Path, tmp_path: Path) -> None:
    zero, minus_zero = (shutil.copytree(folders / "moe_fp32", tmp_path / name) for name in ("zero", "minus_zero"))
    change_tensors(zero, lambda tensors: tensors["model.visual.downsample.bias"].zero_())
    change_tensors(minus_zero, lambda tensors: tensors["model.visual.downsample.bias"].zero_().neg_())
    (difference,) = differences(zero, minus_zero)
    assert difference == TensorDifference("model.visual.downsample.bias", "128 of 128 values differ", 0.0)


MEMORY_OF_A_COMPARISON = """
import resource, sys
from pathlib import Path
from tools.comparison import compare_tensors, open_sides

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
(difference,) = compare_tensors(*open_sides(Path(sys.argv[1]), Path(sys.argv[2])))
print(difference.largest, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_large_tensors_are_compared_in_little_memory(tmp_path: Path) -> None:
    """Two tensors of 400 MB, which differ in one value of the last row, take less than 200 MB."""
    for name, value in (("a", 1.0), ("b", 3.0)):
        (tmp_path / name).mkdir()
        tensor = torch.ones(100_000, 1000)
        tensor[-1, -1] = value
        save_file({"weight": tensor}, tmp_path / name / "model.safetensors")
    largest, kilobytes = run_python(
        "-c", MEMORY_OF_A_COMPARISON, str(tmp_path / "a"), str(tmp_path / "b")
    ).stdout.split()
    assert float(largest) == 2
    assert int(kilobytes) < 200_000


# --- verify --logits --------------------------------------------------------------------------------------------------


def rows_of_prompts(shown: str) -> dict[str, list[str]]:
    lines = [line.split() for line in shown.splitlines()]
    return {words[0]: words for words in lines if words[0] in ("text", "image", "video")}


@pytest.mark.parametrize("case", ["moe_fp32", "dense_fp32"])
def test_logits_of_an_export_are_those_of_the_given_folder(case: str, folders: Path) -> None:
    result = CliRunner().invoke(app, ["verify", str(folders / case), str(folders / "exports" / case), "--logits"])
    assert result.exit_code == 0, result.output
    assert [*rows_of_prompts(result.stdout)] == ["text", "image", "video"]
    assert "the largest difference of a logit is 0, within --tolerance 0" in result.stdout


@torch.no_grad()
def test_logits_of_another_dtype_differ_as_transformers_says(folders: Path) -> None:
    """bfloat16 is above a tolerance of 0, and within one that is larger than the difference."""
    arguments = ["verify", str(folders / "moe_fp32"), str(folders / "exports" / HALF), "--logits"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    shown = rows_of_prompts(result.stdout)
    exported = Exported.load(folders / "moe_fp32"), Exported.load(folders / "exports" / HALF, torch.float32)
    sample = exported[0].encode(exported[0].chat_prompt(TEXT, images=0, videos=0), [], [])
    input_ids = torch.from_numpy(sample.input_ids)[None]
    x, y = (each.model(input_ids=input_ids).logits[0] for each in exported)
    assert shown["text"][1:3] == [str(len(sample)), f"{(x.double() - y.double()).abs().max().item():.3g}"]
    kl = torch.nn.functional.kl_div(
        y.double().log_softmax(-1), x.double().log_softmax(-1), log_target=True, reduction="none"
    )
    assert float(shown["text"][3]) == pytest.approx(kl.sum(-1).max().item(), rel=0.01)
    assert CliRunner().invoke(app, [*arguments, "--tolerance", "1"]).exit_code == 0


def test_other_tokens_of_the_same_prompt_are_reported(folders: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folders / "dense_fp32", tmp_path / "other")
    (other / "chat_template.jinja").write_text("[gMASK]<sop>{{ messages[0].content[0].text }}")
    result = CliRunner().invoke(app, ["verify", str(folders / "dense_fp32"), str(other), "--logits"])
    assert result.exit_code == 2
    assert "their tokenizers or processors differ" in result.stderr


def test_tolerance_without_logits_is_refused(folders: Path) -> None:
    result = CliRunner().invoke(
        app, ["verify", str(folders / "dense_fp32"), str(folders / "dense_fp32"), "--tolerance", "1"]
    )
    assert result.exit_code == 2
    assert "--tolerance is for --logits" in result.stderr


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


# Found while weights are read, in a process group. These calls need a new process: this one may have a group already.
FOUND_WHILE_READING = ("weights that are not finite", "a damaged checkpoint")


def call(arguments: list[str], *, new_process: bool) -> tuple[int, str, str]:
    """Call tools.convert and return its exit status, standard output and standard error."""
    if not new_process:
        result = CliRunner().invoke(app, arguments)
        return result.exit_code, result.stdout, result.stderr
    done = subprocess.run(
        [sys.executable, "-m", "tools.convert", *arguments],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_line(case: str, folders: Path, tmp_path: Path) -> None:
    make_bad, message = REFUSED[case]
    shutil.copytree(folders / "moe_fp32", tmp_path / "hf")
    shutil.copytree(folders / "checkpoints/moe_fp32", tmp_path / "checkpoint")
    arguments = make_bad(tmp_path)
    before = sorted((tmp_path / "out").iterdir()) if (tmp_path / "out").exists() else None
    arguments += ["--out", str(tmp_path / "out")]
    status, output, error = call(arguments, new_process=case in FOUND_WHILE_READING)
    assert status == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert "was called" not in output + error
    after = sorted((tmp_path / "out").iterdir()) if (tmp_path / "out").exists() else None
    assert after == before


@pytest.mark.parametrize("case", CASES)
def test_verify_takes_checkpoints(case: str, folders: Path, tmp_path: Path) -> None:
    checkpoint, changed = folders / "checkpoints" / case, shutil.copytree(folders / case, tmp_path / "changed")
    assert differences(checkpoint, folders / case) == []
    assert differences(checkpoint, checkpoint) == []
    change_tensors(changed, change_value)
    (found,) = differences(changed, checkpoint)
    assert isinstance(found, TensorDifference)
    assert (found.name, found.what) == ("model.visual.downsample.bias", "1 of 128 values differ")
    result = CliRunner().invoke(app, ["verify", str(checkpoint), str(folders / case), "--logits"])
    assert result.exit_code == 2
    assert "is a checkpoint: export it first" in result.stderr


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
