"""Models are compared tensor by tensor, file by file and by their logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.tools.converted_folders import CASES, HALF, change_tensors, change_value, differences, run_python
from tools.comparison import TensorDifference
from tools.convert import app
from tools.exported import Exported
from tools.probe import TEXT


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
