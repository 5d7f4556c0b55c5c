"""Folders in other formats: FP8 with scales, fused experts, pickles. transformers and torch are the references."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from model.config import GlmvConfig
from model.errors import WeightsError
from model.glmv import GlmvModel
from model.parallel import ParallelConfig
from model.weights.formats.opened import open_folder
from model.weights.load import SafetensorsFolder, load_weights
from model.weights.source import WeightSource, whole
from tests.hf_folders import save_weights
from tests.model_tensors import hf_tensors
from tests.reference import small_config, transformers_model

pytestmark = pytest.mark.fast

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_weights("glm4v_moe", tmp_path_factory.mktemp("plain"), dtype=torch.bfloat16)


# --- FP8 --------------------------------------------------------------------------------------------------------------


def is_quantised(name: str) -> bool:
    """Return whether releases in FP8 quantise a weight: those of linear layers of the decoder, but not the router."""
    projections = ("_proj.weight", "mlp.gate_up_proj.weight")
    return name.startswith("model.language_model.layers.") and name.endswith(projections)


def per_tensor(weight: Tensor) -> Tensor:
    return weight.abs().max() / LARGEST


def per_row(weight: Tensor) -> Tensor:
    return weight.abs().amax(1, keepdim=True) / LARGEST


def per_row_in_one_dimension(weight: Tensor) -> Tensor:
    return per_row(weight)[:, 0]


def per_block(block: int) -> Callable[[Tensor], Tensor]:
    def scale(weight: Tensor) -> Tensor:
        rows, columns = (ceil(size / block) for size in weight.shape)
        filled = torch.zeros(rows * block, columns * block)
        filled[: weight.size(0), : weight.size(1)] = weight.abs()
        return filled.view(rows, block, columns, block).amax((1, 3)) / LARGEST

    return scale


def expanded(scale: Tensor, weight: Tensor, block: int) -> Tensor:
    """Return one factor for each value."""
    if scale.dim() == 1:
        scale = scale[:, None]
    if scale.dim() == 2 and scale.shape != (weight.size(0), 1):
        scale = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)
        scale = scale[: weight.size(0), : weight.size(1)]
    return scale.expand(weight.shape)


# How scales are made, their suffix, and the block of config.json.
KINDS: dict[str, tuple[Callable[[Tensor], Tensor], str, int]] = {
    "tensor": (per_tensor, "_scale", 128),
    "row": (per_row, "_scale", 128),
    "row, one dimension": (per_row_in_one_dimension, "_scale", 128),
    "blocks of 32": (per_block(32), "_scale_inv", 32),
    "blocks of 32, compressed-tensors": (per_block(32), "_scale", 32),
    "blocks that do not divide": (per_block(48), "_scale_inv", 48),
    "blocks of 128": (per_block(128), "_scale_inv", 128),
}


def quantise(plain: Path, folder: Path, kind: str, scale_dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Write an FP8 folder with its scales in another file, and return the tensors that it stands for."""
    make_scale, suffix, block = KINDS[kind]
    weights, scales, expected = {}, {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if not is_quantised(name):
            weights[name] = expected[name] = tensor
            continue
        scale = make_scale(tensor.float()).to(scale_dtype)
        factors = expanded(scale, tensor, block).float()
        weights[name] = (tensor.float() / factors).clamp(-LARGEST, LARGEST).to(FP8)
        scales[name + suffix] = scale.contiguous()
        expected[name] = (weights[name].float() * factors).to(torch.bfloat16)
    write_shards(folder, [weights, scales])
    content = json.loads((plain / "config.json").read_text())
    method: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [block, block]}
    if suffix == "_scale":
        group = {"weights": {"num_bits": 8, "type": "float", "block_structure": [block, block]}}
        method = {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": group},
        }
    (folder / "config.json").write_text(json.dumps({**content, "quantization_config": method}))
    return expected


def write_shards(folder: Path, shards: list[dict[str, Tensor]]) -> None:
    folder.mkdir()
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for file, tensors in zip(files, shards, strict=True):
        save_file(tensors, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, tensors in zip(files, shards, strict=True) for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def compare(source: WeightSource, expected: dict[str, Tensor]) -> None:
    assert sorted(source.names()) == sorted(expected)
    for name, tensor in expected.items():
        assert source.dtype(name) == tensor.dtype, name
        assert source.shape(name) == tuple(tensor.shape), name
        assert torch.equal(whole(source, name), tensor), name


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_values_are_products_in_float32(kind: str, scale_dtype: torch.dtype, plain: Path, tmp_path: Path) -> None:
    expected = quantise(plain, tmp_path / "fp8", kind, scale_dtype)
    source, read_as = open_folder(tmp_path / "fp8")
    compare(source, expected)
    block = KINDS[kind][2]
    named = {"tensor": "one scale per tensor", "row": "one scale per row", "blocks": f"block scales {block}x{block}"}
    assert read_as[0].startswith(f"FP8, {named[kind.split()[0].strip(',')]} (")


@pytest.mark.parametrize("kind", ["blocks of 32", "row"])
def test_blocks_equal_those_of_transformers(kind: str, plain: Path, tmp_path: Path) -> None:
    """Transformers derives the block from the shapes, so a row is a block too."""
    quantise(plain, tmp_path / "fp8", kind)
    stored, (source, _) = SafetensorsFolder(tmp_path / "fp8"), open_folder(tmp_path / "fp8")
    dequantise = Fp8Dequantize(hf_quantizer=None)._dequantize_one
    compared = 0
    for name in source.names():
        if is_quantised(name) and source.shape(name)[0] % 32 == 0:
            scale = stored.unchecked_tensor(name + KINDS[kind][1])
            reference = dequantise(stored.unchecked_tensor(name), scale, output_dtype=torch.bfloat16)
            assert torch.equal(whole(source, name), reference), name
            compared += 1
    assert compared == 100


@pytest.mark.parametrize("kind", KINDS)
def test_rows_equal_those_of_the_whole(kind: str, plain: Path, tmp_path: Path) -> None:
    quantise(plain, tmp_path / "fp8", kind)
    source, _ = open_folder(tmp_path / "fp8")
    for name in filter(is_quantised, source.names()[::7]):
        all_rows = whole(source, name)
        for start in range(0, len(all_rows), 37):
            for stop in {start + 1, min(start + 37, len(all_rows)), len(all_rows)}:
                assert torch.equal(source.rows(name, start, stop), all_rows[start:stop])


def test_a_model_is_filled_with_the_products(plain: Path, single_process: None, tmp_path: Path) -> None:
    expected = quantise(plain, tmp_path / "fp8", "blocks of 32")
    model = GlmvModel(GlmvConfig.from_hf(tmp_path / "fp8"), ParallelConfig(), dtype=torch.bfloat16)
    load_weights([model], open_folder(tmp_path / "fp8").source)
    for name, tensor in hf_tensors(model):
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    "content", [{}, {"quantization_config": 5}, {"quantization_config": {"config_groups": {"a": 1}}}]
)
def test_blocks_are_128_where_a_config_says_nothing_of_them(
    content: dict[str, Any], plain: Path, tmp_path: Path
) -> None:
    expected = quantise(plain, tmp_path / "fp8", "blocks of 128")
    (tmp_path / "fp8/config.json").write_text(json.dumps(content))
    compare(open_folder(tmp_path / "fp8").source, expected)


def test_scales_of_activations_are_no_weights(plain: Path, tmp_path: Path) -> None:
    expected = quantise(plain, tmp_path / "fp8", "tensor")
    layer = "model.language_model.layers.2.self_attn."
    unused = {f"{layer}{name}": torch.ones(1) for name in ("q_proj.input_scale", "k_scale", "v_scale")}
    shards = [load_file(path) for path in sorted((tmp_path / "fp8").glob("*.safetensors"))]
    write_shards(tmp_path / "static", [*shards, unused])
    source, read_as = open_folder(tmp_path / "static")
    compare(source, expected)
    assert read_as[1] == "scales of activations (3 tensors) are not used"


Q = "model.language_model.layers.2.self_attn.q_proj.weight"
Shards = list[dict[str, Tensor]]


def drop_scale(shards: Shards) -> None:
    del shards[1][f"{Q}_scale_inv"]


def drop_tensor(shards: Shards) -> None:
    del shards[0][Q]


def store_plain(shards: Shards) -> None:
    shards[0][Q] = shards[0][Q].to(torch.bfloat16)


def cut_scale(shards: Shards) -> None:
    shards[1][f"{Q}_scale_inv"] = shards[1][f"{Q}_scale_inv"][1:].contiguous()


def integer_scale(shards: Shards) -> None:
    shards[1][f"{Q}_scale_inv"] = shards[1][f"{Q}_scale_inv"].to(torch.int32)


def infinite_scale(shards: Shards) -> None:
    shards[1][f"{Q}_scale_inv"][0, 0] = torch.inf


def nan_in_float8(shards: Shards) -> None:
    shards[0][Q][5, 5] = torch.nan


def packed_integers(shards: Shards) -> None:
    shards[0]["lm_head.weight"] = shards[0]["lm_head.weight"].to(torch.uint8)


BAD_SCALES: dict[str, tuple[Callable[[Shards], None], str]] = {
    "an absent scale": (drop_scale, rf"tensors in FP8 without a scale: {Q}: a file is missing"),
    "a scale alone": (drop_tensor, rf"scales without a tensor in FP8: {Q}_scale_inv"),
    "a scale of a plain tensor": (store_plain, rf"scales without a tensor in FP8: {Q}_scale_inv"),
    "a scale of another shape": (cut_scale, r"_scale_inv is \[7, 4\], which fits neither .* blocks of 32x32 of"),
    "a scale of integers": (integer_scale, "_scale_inv is stored as torch.int32"),
    "an infinite scale": (infinite_scale, rf"tensor {Q} has values or scales that are not finite"),
    "a value that is no number": (nan_in_float8, rf"tensor {Q} has values or scales that are not finite"),
    "weights in integers": (packed_integers, r"tensors are stored as uint8: lm_head.weight; quantised and integer"),
}


@pytest.mark.parametrize("case", BAD_SCALES)
def test_scales_that_do_not_fit_are_named(case: str, plain: Path, tmp_path: Path) -> None:
    damage, message = BAD_SCALES[case]
    quantise(plain, tmp_path / "fp8", "blocks of 32")
    shards = [load_file(path) for path in sorted((tmp_path / "fp8").glob("*.safetensors"))]
    damage(shards)
    write_shards(tmp_path / "bad", shards)
    (tmp_path / "bad" / "config.json").write_bytes((tmp_path / "fp8" / "config.json").read_bytes())
    with pytest.raises(WeightsError, match=message):
        whole(open_folder(tmp_path / "bad").source, Q)


# --- fused experts ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_memory(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """The folder of `save_pretrained`, and the tensors of the same model as transformers holds them: experts fused."""
    folder = save_weights("glm4v_moe", tmp_path_factory.mktemp("fused"))
    return folder, dict(transformers_model(small_config("glm4v_moe"), seed=0).state_dict())


def write(folder: Path, tensors: dict[str, Tensor], config: Path) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_bytes((config / "config.json").read_bytes())
    return folder


@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_fused_experts_are_those_of_save_pretrained(
    suffix: str, in_memory: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    saved, tensors = in_memory
    renamed = {f"{name}{suffix}" if ".experts." in name else name: tensor for name, tensor in tensors.items()}
    source, read_as = open_folder(write(tmp_path, renamed, saved))
    compare(source, load_file(saved / "model.safetensors"))
    assert read_as == ("fused experts (6 tensors), as one tensor per expert",)
    name = "model.language_model.layers.3.mlp.experts.5.up_proj.weight"
    assert torch.equal(source.rows(name, 7, 50), whole(source, name)[7:50])


def test_fused_experts_may_be_in_fp8(in_memory: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    saved, tensors = in_memory
    stored, scales, expected = {}, {}, dict(load_file(saved / "model.safetensors"))
    for name, tensor in tensors.items():
        if ".experts." not in name:
            stored[name] = tensor
            continue
        scale = torch.stack([per_block(128)(expert) for expert in tensor])
        factors = torch.stack([expanded(s, expert, 128) for s, expert in zip(scale, tensor, strict=True)])
        stored[name] = (tensor / factors).to(FP8)
        scales[f"{name}_scale_inv"] = scale
        for expert, value in enumerate(stored[name].float() * factors):
            parts = value.chunk(2) if name.endswith("gate_up_proj") else [value]
            kinds = ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)
            for kind, part in zip(kinds, parts, strict=True):
                expected[f"{name.rpartition('.')[0]}.{expert}.{kind}.weight"] = part
    source, read_as = open_folder(write(tmp_path, stored | scales, saved))
    compare(source, expected)
    assert read_as[0] == "FP8, block scales 128x128 (6)"


def transposed(name: str, tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2) if ".experts." in name else tensor


def test_transposed_experts_are_refused_by_shape(in_memory: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    saved, tensors = in_memory
    write(tmp_path, {name: transposed(name, tensor) for name, tensor in tensors.items()}, saved)
    message = r"experts.down_proj is \[8, 96, 128\], not \[experts, 128, width\]: the experts are stored transposed"
    with pytest.raises(WeightsError, match=message):
        open_folder(tmp_path)


# --- pickles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth", "model.pt"]
)
def test_pickled_weights_are_refused_with_the_way(name: str, plain: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"not even opened")
    with pytest.raises(WeightsError, match=rf"{name} would be unpickled, .*save_pretrained of transformers"):
        open_folder(tmp_path)


def test_a_pickle_beside_safetensors_is_not_looked_at(plain: Path, tmp_path: Path) -> None:
    write(tmp_path, load_file(plain / "model.safetensors"), plain)
    (tmp_path / "training_args.bin").write_bytes(b"not even opened")
    compare(open_folder(tmp_path).source, load_file(plain / "model.safetensors"))
