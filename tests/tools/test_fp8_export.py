"""tools.convert export --fp8: what is written, who reads it, and that a second time gives the same bytes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import FineGrainedFP8Config
from typer.testing import CliRunner

from model.weights.formats.block_fp8 import SCALE, converted_names
from model.weights.formats.opened import open_folder
from model.weights.source import whole
from model.weights.table import hf_shapes
from tests.model.test_block_fp8 import convertible, expanded, reference
from tests.reference import save_transformers_model, small_config, transformers_model
from tools.conversion import fp8_names
from tools.convert import app
from tools.hf_output import ConvertError

TYPES = ("glm4v_moe", "glm4v")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By model: given/ in bfloat16, its checkpoint, fp8/ in shards; checkpoint2, fp8_again/ and plain/ of fp8/."""
    root = tmp_path_factory.mktemp("fp8")
    for hf_type in TYPES:
        folder = root / hf_type
        model: Any = transformers_model(convertible(hf_type)).bfloat16()
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.data = buffer.data.float()
        model.save_pretrained(folder / "given")
        convert("import", "--hf", folder / "given", "--out", folder / "checkpoint")
        fp8 = ("export", "--fp8", "--max-shard-size", "1MB", "--checkpoint")
        convert(*fp8, folder / "checkpoint", "--out", folder / "fp8")
        convert("import", "--hf", folder / "fp8", "--out", folder / "checkpoint2")
        convert(*fp8, folder / "checkpoint2", "--out", folder / "fp8_again")
        convert("export", "--checkpoint", folder / "checkpoint2", "--out", folder / "plain")
    return root


def convert(*arguments: object, fails: bool = False) -> str:
    """Run tools.convert; return what it prints, or its error."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--processes", "1"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert bool(result.exit_code) == fails, result.output
    return result.stderr if fails else result.stdout


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("hf_type", TYPES)
def test_export_has_the_engines_values_and_scales(hf_type: str, folders: Path) -> None:
    given, exported = stored(folders / hf_type / "given"), stored(folders / hf_type / "fp8")
    converted = converted_names(hf_shapes(convertible(hf_type)))
    assert exported.keys() == given.keys() | {name + SCALE for name in converted}
    for name, tensor in given.items():
        if name in converted:
            values, scales = reference(tensor)
            assert torch.equal(exported[name].view(torch.uint8), values.view(torch.uint8)), name
            assert torch.equal(exported[name + SCALE], scales), name
        else:
            assert exported[name].dtype == tensor.dtype, name
            assert torch.equal(exported[name], tensor), name
    config = json.loads((folders / hf_type / "fp8/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "fp8"
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    assert config["dtype"] == "bfloat16"


@pytest.mark.parametrize("hf_type", TYPES)
def test_import_then_export_returns_every_byte(hf_type: str, folders: Path) -> None:
    first, again = folders / hf_type / "fp8", folders / hf_type / "fp8_again"
    assert len(list(first.glob("*.safetensors"))) > 1
    assert {path.name for path in first.iterdir()} == {path.name for path in again.iterdir()}
    for path in first.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


@pytest.mark.parametrize("hf_type", TYPES)
def test_import_reads_the_products(hf_type: str, folders: Path) -> None:
    exported, plain = stored(folders / hf_type / "fp8"), stored(folders / hf_type / "plain")
    source, _ = open_folder(folders / hf_type / "fp8")
    assert sorted(source.names()) == sorted(plain)
    for name, tensor in plain.items():
        product = exported[name]
        if name + SCALE in exported:
            product = (product.float() * expanded(exported[name + SCALE], tensor.shape)).bfloat16()
        assert torch.equal(whole(source, name), product), name
        assert torch.equal(tensor, product), name
    assert "quantization_config" not in json.loads((folders / hf_type / "plain/config.json").read_text())


@pytest.mark.parametrize("hf_type", TYPES)
def test_transformers_computes_with_the_products(hf_type: str, folders: Path) -> None:
    """The logits are those of the plain folder bit for bit, and near those of the weights before FP8."""
    input_ids = torch.arange(40, 104)[None]
    logits = {}
    for name in ("given", "plain", "fp8"):
        more = {"quantization_config": FineGrainedFP8Config(dequantize=True)} if name == "fp8" else {}
        load = transformers.AutoModelForImageTextToText.from_pretrained
        model, report = load(folders / hf_type / name, dtype=torch.bfloat16, output_loading_info=True, **more)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), name
        with torch.no_grad():
            logits[name] = model(input_ids=input_ids).logits.float()
    assert torch.equal(logits["fp8"], logits["plain"])
    error = (logits["fp8"] - logits["given"]).norm() / logits["given"].norm()
    assert 0 < error < 0.1


def test_other_weights_have_the_dtype_of_the_option(folders: Path, tmp_path: Path) -> None:
    given = folders / "glm4v_moe"
    shown = convert(
        "export", "--fp8", "--dtype", "fp32", "--checkpoint", given / "checkpoint", "--out", tmp_path / "out"
    )
    assert "FP8: 97 of 156 tensors" in " ".join(shown.split())
    assert "plain, because a size is no multiple of 128: model.language_model.layers.0.mlp" in " ".join(shown.split())
    bfloat16, float32 = stored(given / "fp8"), stored(tmp_path / "out")
    for name, tensor in float32.items():
        expected = torch.float8_e4m3fn if name + SCALE in float32 else torch.float32
        assert tensor.dtype == expected, name
        assert torch.equal(tensor.float(), bfloat16[name].float()), name


def test_a_damaged_tensor_is_named(folders: Path, tmp_path: Path) -> None:
    """Of the checkpoint, although none of its bytes are written as they are."""
    checkpoint = tmp_path / "checkpoint"
    model = save_transformers_model(convertible("glm4v"), tmp_path / "given")
    convert("import", "--hf", tmp_path / "given", "--out", checkpoint)
    weight: Any = model.get_parameter("model.language_model.layers.2.mlp.down_proj.weight")
    row = weight.detach()[77].contiguous().numpy().tobytes()
    (path,) = [path for path in checkpoint.rglob("*.distcp") if row in path.read_bytes()]
    data = bytearray(path.read_bytes())
    data[data.index(row) + 1] ^= 1
    path.write_bytes(data)
    error = convert("export", "--fp8", "--checkpoint", checkpoint, "--out", tmp_path / "out", fails=True)
    assert "tensor model.language_model.layers.2.mlp.down_proj.weight has another checksum" in error
    assert not (tmp_path / "out").exists()


def test_a_model_without_blocks_is_refused() -> None:
    config = small_config("glm4v")
    narrow: dict[str, Any] = {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3}
    decoder, vision = replace(config.decoder, **narrow), replace(config.vision, out_hidden_size=96)
    with pytest.raises(ConvertError, match="--fp8 would convert nothing"):
        fp8_names(replace(config, decoder=decoder, vision=vision))
