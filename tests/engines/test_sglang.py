"""SGLang's own models take every tensor of an export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from model.weights.folder import SafetensorsFolder
from tests.engines.engine_folders import ENGINES, MODELS, exported_folder, run

CLASSES = {"glm4v_moe": "Glm4vMoeForConditionalGeneration", "glm4v": "Glm4vForConditionalGeneration"}


def sglang_report(folder: Path) -> dict[str, Any]:
    written = folder.with_name("report.json")
    overlay = str(ENGINES.parents[1] / "sglang")
    run(ENGINES, "tests/engines/sglang_weights.py", folder, written, path=overlay)
    return json.loads(written.read_text())


@pytest.mark.parametrize(
    ("model", "fp8"), [*((name, False) for name in MODELS), ("GLM-4.5V", True), ("GLM-4.1V", True)]
)
def test_sglang_takes_every_tensor(model: str, fp8: bool, tokenizer_folder: Path, tmp_path: Path) -> None:
    """In FP8 the modules that SGLang makes with scales are those that the export has scales for."""
    folder = exported_folder(model, tokenizer_folder, tmp_path, fp8=fp8)
    report = sglang_report(folder)
    exported = SafetensorsFolder(folder)
    print(f"{model}{', FP8' if fp8 else ''}: {report['tensors']} tensors, {report['values']:,} values")
    if fp8:  # scales of the cache, which are not in a folder
        report["unfilled"] = [name for name in report["unfilled"] if not name.endswith((".k_scale", ".v_scale"))]
    assert report == {
        "model": CLASSES[MODELS[model][0]],
        "tensors": len(exported.names()),
        "values": sum(exported.tensor(name).numel() for name in exported.names()),
        "not_taken": [],
        "different": [],
        "unfilled": [],
    }


def test_report_names_a_tensor_that_sglang_skips(tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = exported_folder("GLM-4.1V", tokenizer_folder, tmp_path)
    name = "model.visual.post_layernorm.weight"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = folder / index["weight_map"][name]
    renamed = {f"{each}_" if each == name else each: tensor for each, tensor in load_file(shard).items()}
    save_file(renamed, shard, metadata={"format": "pt"})
    report = sglang_report(folder)
    assert report["not_taken"] == [f"{name}_"]
    assert report["unfilled"] == ["visual.post_layernorm.weight"]
