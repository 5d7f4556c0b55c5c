"""Weight names, transforms and slices, compared with transformers' models and folders."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.core_model_loading import revert_weight_conversion

from model.config import GlmvConfig
from model.errors import WeightsError
from model.finite import nonfinite
from model.glmv import GlmvModel
from model.parallel import ParallelConfig
from model.process_groups import initialize_model_parallel
from model.weights.formats.opened import open_folder
from model.weights.load import RandomWeights, SafetensorsFolder, hf_shapes, load_weights, local_tensors
from model.weights.remote import hf_folder
from model.weights.source import whole
from model.weights.table import GATE_UP, QKV, VISION_QKV, sizes, weights
from model.weights.transforms import COPY, Piece, Transform
from streaming.hf_job import HfJob
from tests.hf_folders import VARIANTS, save_weights
from tests.model.range_server import RangeServer
from tests.model_tensors import hf_tensors
from tests.peft_reference import Tensors
from tests.processes import Processes
from tests.reference import PRESETS, small_config

FULL_SIZE = {"glm45v": (18_106, 107_710_927_360), "glm41v_9b": (704, 10_292_777_472)}
EXPERT_BIASES = {"glm45v": 45 * 128, "glm41v_9b": 0}


class FakeWeights:
    """Weights of full size without memory, under FakeTensorMode, which record what was read."""

    def __init__(self, config: GlmvConfig) -> None:
        self.shapes = hf_shapes(config)
        self.read: Counter[str] = Counter()  # rows

    def names(self) -> list[str]:
        return list(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        self.read[name] += stop - start
        return torch.empty((stop - start, *self.shapes[name][1:]))

    def where(self, name: str) -> str:
        return "memory"


def altered(source: SafetensorsFolder, changes: dict[str, Tensor | None]) -> Tensors:
    """Return the tensors of a folder with some replaced, or removed (None)."""
    tensors = {name: source.tensor(name) for name in source.names()} | changes
    return Tensors({name: tensor for name, tensor in tensors.items() if tensor is not None})


# --- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize("preset", FULL_SIZE)
def test_names_and_shapes_equal_transformers_at_full_size(preset: str) -> None:
    config = GlmvConfig.from_preset(preset)
    content = config.to_hf()
    with torch.device("meta"):
        reference = getattr(transformers, content["architectures"][0])(transformers.AutoConfig.for_model(**content))
    on_disk = revert_weight_conversion(reference, reference.state_dict())
    assert hf_shapes(config) == {name: tuple(tensor.shape) for name, tensor in on_disk.items()}
    tensors, parameters = FULL_SIZE[preset]
    assert len(on_disk) == tensors
    assert number_of_values(config) == parameters + EXPERT_BIASES[preset]


def number_of_values(config: GlmvConfig) -> int:
    return sum(prod(shape) for shape in hf_shapes(config).values())


@pytest.mark.parametrize("preset", FULL_SIZE)
def test_full_size_model_reads_every_tensor_once(
    preset: str, single_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tracker of random states compares states, which is not possible with fake tensors.
    monkeypatch.setattr(CudaRNGStatesTracker, "fork", lambda self, *_: contextlib.nullcontext())
    config = GlmvConfig.from_preset(preset)
    with FakeTensorMode():
        model = GlmvModel(config, ParallelConfig(), dtype=torch.bfloat16)
        assert sum(parameter.numel() for parameter in model.parameters()) == FULL_SIZE[preset][1]
        source = FakeWeights(config)
        load_weights([model], source)
        assert source.read == {name: shape[0] for name, shape in source.shapes.items()}
        assert {name: tuple(tensor.shape) for name, tensor in hf_tensors(model)} == source.shapes


@pytest.mark.fast
@pytest.mark.parametrize("preset", FULL_SIZE)
def test_no_tensor_is_in_two_rows(preset: str) -> None:
    table = list(weights(GlmvConfig.from_preset(preset)))
    assert len({weight.name for weight in table}) == len(table)
    on_disk = [name for weight in table for name in weight.hf]
    assert len(set(on_disk)) == len(on_disk)


@pytest.mark.fast
def test_qkv_rows_are_stored_per_group() -> None:
    """The example in the docstring of the table: 4 queries on 2 groups, head_dim 1."""
    size = {"groups": 2, "q": 4, "kv": 2}
    q, k, v = torch.tensor([0, 1, 2, 3]), torch.tensor([10, 11]), torch.tensor([20, 21])
    joined = QKV.to_megatron([q, k, v], size)
    assert joined.tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    for part, tensor in enumerate((q, k, v)):
        assert rows_of_part(QKV, joined, [4, 2, 2], size, part).tolist() == tensor.tolist()
    assert list(QKV.places([4, 2, 2], size, 0, 1, 4)) == [(1, 2), (4, 6)]


@pytest.mark.fast
def test_vision_rows_are_stored_per_head() -> None:
    """Two heads of size 1: q0 q1 k0 k1 v0 v1 in the folder."""
    size = {"vision_heads": 2}
    on_disk = torch.tensor([[0.0], [1.0], [10.0], [11.0], [20.0], [21.0]])
    joined = VISION_QKV.to_megatron([on_disk], size)
    assert joined.flatten().tolist() == [0, 10, 20, 1, 11, 21]
    assert torch.equal(rows_of_part(VISION_QKV, joined, [6], size, 0), on_disk)


def rows_of_part(transform: Transform, joined: Tensor, rows: list[int], size: dict[str, int], part: int) -> Tensor:
    return torch.cat([joined[start:stop] for start, stop in transform.places(rows, size, part, 0, rows[part])])


# --- import and export ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_import_then_export_returns_the_same_tensors(
    variant: str, dtype: torch.dtype, single_process: None, tmp_path: Path
) -> None:
    source = SafetensorsFolder(save_weights(variant, tmp_path, dtype=dtype))
    model = GlmvModel(GlmvConfig.from_hf(tmp_path), ParallelConfig(), dtype=dtype)
    load_weights([model], source)
    exported = dict(hf_tensors(model))
    assert sorted(exported) == sorted(source.names())
    for name, tensor in exported.items():
        assert tensor.dtype == source.dtype(name)
        assert torch.equal(tensor, source.tensor(name)), name


@pytest.mark.fast
def test_values_are_where_megatron_reads_them(single_process: None, tmp_path: Path) -> None:
    """Positions computed by hand: the second query head of group 3, an expert's up projection, and a vision key."""
    source = SafetensorsFolder(save_weights("glm4v_moe", tmp_path))
    config = GlmvConfig.from_hf(tmp_path)
    model = GlmvModel(config, ParallelConfig())
    load_weights([model], source)
    held = dict(local_tensors(model))
    dim, queries = config.decoder.head_dim, 2  # 8 heads on 4 groups
    row = 3 * (queries + 2) * dim + dim
    qkv = held["language_model.decoder.layers.2.self_attention.linear_qkv.weight"]
    q = source.tensor("model.language_model.layers.2.self_attn.q_proj.weight")
    assert torch.equal(qkv[row : row + dim], q[7 * dim : 8 * dim])
    fc1 = held["language_model.decoder.layers.3.mlp.experts.local_experts.5.linear_fc1.weight"]
    up = source.tensor("model.language_model.layers.3.mlp.experts.5.up_proj.weight")
    assert torch.equal(fc1[config.decoder.moe_intermediate_size :], up)
    dim = config.vision.head_dim
    vision_qkv = held["vision_model.blocks.layers.1.self_attention.linear_qkv.weight"]
    fused = source.tensor("model.visual.blocks.1.attn.qkv.weight")
    k_of_head_2 = fused[config.vision.hidden_size + 2 * dim :][:dim]
    assert torch.equal(vision_qkv[(2 * 3 + 1) * dim :][:dim], k_of_head_2)


WRONG_TRANSFORMS = {
    "gate and up swapped": ("GATE_UP", lambda rows, size: iter((Piece(1, 0, rows[1]), Piece(0, 0, rows[0])))),
    "QKV not grouped": ("QKV", COPY.order),
    "vision heads not first": ("VISION_QKV", COPY.order),
}


@pytest.mark.fast
@pytest.mark.parametrize("mistake", WRONG_TRANSFORMS)
def test_wrong_transform_changes_the_tensors(mistake: str, single_process: None, tmp_path: Path) -> None:
    """The round trip above would notice a mistake in one direction."""
    name, order = WRONG_TRANSFORMS[mistake]
    right = {"GATE_UP": GATE_UP, "QKV": QKV, "VISION_QKV": VISION_QKV}[name]
    wrong = dataclasses.replace(right, order=order)
    source = SafetensorsFolder(save_weights("glm4v_moe", tmp_path))
    model = GlmvModel(GlmvConfig.from_hf(tmp_path), ParallelConfig())
    load_weights([model], source)
    held = dict(local_tensors(model))
    size = sizes(model.glmv_config)
    touched = [weight for weight in weights(model.glmv_config) if weight.transform is right]
    assert touched
    for weight in touched:
        broken = wrong.to_megatron([source.tensor(part) for part in weight.hf], size)
        assert broken.shape == held[weight.name].shape  # the check of shapes would not notice
        assert not torch.equal(broken, held[weight.name]), weight.name


# --- random initialisation --------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_random_weights_depend_only_on_seed_and_name() -> None:
    config = GlmvConfig.from_preset("tiny_moe")
    forwards, backwards = RandomWeights(config, seed=3), RandomWeights(config, seed=3)
    first = {name: whole(forwards, name) for name in forwards.names()}
    for name in reversed(backwards.names()):
        assert torch.equal(whole(backwards, name), first[name])
    gate = "model.language_model.layers.1.mlp.experts.0.gate_proj.weight"
    assert not torch.equal(first[gate], whole(RandomWeights(config, seed=4), gate))
    assert not torch.equal(first[gate], first[gate.replace("experts.0", "experts.1")])


@pytest.mark.fast
@pytest.mark.parametrize("preset", PRESETS.values())
def test_random_weights_have_the_distribution_of_transformers(preset: str) -> None:
    config = GlmvConfig.from_preset(preset)
    content = config.to_hf()
    torch.manual_seed(0)
    reference = getattr(transformers, content["architectures"][0])(transformers.AutoConfig.for_model(**content))
    expected_tensors = revert_weight_conversion(reference, reference.state_dict())
    source, std = RandomWeights(config, seed=0), config.decoder.initializer_range
    for name in source.names():
        found, expected = whole(source, name), expected_tensors[name]
        if expected.dim() == 1:
            assert torch.equal(found, expected), name
        else:
            assert found.mean().item() == pytest.approx(0.0, abs=4 * std / found.numel() ** 0.5)
            assert found.std().item() == pytest.approx(std, rel=4 / found.numel() ** 0.5), name
            assert found.std().item() == pytest.approx(expected.std().item(), rel=8 / found.numel() ** 0.5), name


# --- layouts ----------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "moe TP2": ("glm4v_moe", ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)),
    "moe EP2": ("glm4v_moe", ParallelConfig(expert_model_parallel_size=2)),
    "dense TP2": ("glm4v", ParallelConfig(tensor_model_parallel_size=2)),
}


@pytest.fixture(scope="module")
def pair() -> Iterator[Processes]:
    with Processes(2) as processes:
        yield processes


def tensors_of_rank(config: GlmvConfig, parallel: ParallelConfig, folder: Path | None) -> dict[str, np.ndarray]:
    """Return what one process of a layout holds after loading from a folder, or from a seed."""
    initialize_model_parallel(parallel, seed=0)
    model = GlmvModel(config, parallel)
    load_weights([model], SafetensorsFolder(folder) if folder else RandomWeights(config, seed=5))
    return {name: tensor.numpy() for name, tensor in local_tensors(model)}


def join_slices(name: str, whole: Tensor, parts: list[Tensor]) -> Tensor:
    """Join the slices of two ranks as megatron-core's linear layers multiply with them."""
    if parts[0].shape == whole.shape:
        assert torch.equal(parts[0], parts[1])
        return parts[0]
    if name.endswith("linear_fc1.weight"):
        (gate0, up0), (gate1, up1) = (part.chunk(2) for part in parts)
        return torch.cat([gate0, gate1, up0, up1])
    columns = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
    return torch.cat(parts, dim=1 if columns else 0)


@pytest.mark.parametrize("source", ["folder", "seed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_together_hold_the_tensors_of_one_process(
    layout: str, source: str, pair: Processes, single_process: None, tmp_path: Path
) -> None:
    variant, parallel = LAYOUTS[layout]
    config = small_config(variant)
    folder = save_weights(variant, tmp_path) if source == "folder" else None
    model = GlmvModel(config, ParallelConfig())
    load_weights([model], SafetensorsFolder(folder) if folder else RandomWeights(config, seed=5))
    whole = dict(local_tensors(model))
    ranks = pair.run(tensors_of_rank, config=config, parallel=parallel, folder=folder)
    split = 0
    for name, tensor in whole.items():
        parts = [torch.from_numpy(held[name]) for held in ranks if name in held]
        if ".local_experts." in name and parallel.expert_model_parallel_size == 2:
            expert = int(name.split(".local_experts.")[1].split(".")[0])
            assert [name in held for held in ranks] == [expert < 4, expert >= 4]
            parts *= 2
        assert torch.equal(join_slices(name, tensor, parts), tensor), name
        split += parts[0].shape != tensor.shape
    assert set().union(*ranks) == set(whole)
    assert (split > 0) == (parallel.tensor_model_parallel_size == 2)


def tensors_from_url(config: GlmvConfig, parallel: ParallelConfig, url: str, cache: Path) -> dict[str, np.ndarray]:
    """Return what one process holds after loading from a URL, which it signs with its rank."""
    os.environ["XDG_CACHE_HOME"] = str(cache)
    initialize_model_parallel(parallel, seed=0)
    model = GlmvModel(config, parallel)
    dist.barrier()
    load_weights([model], open_folder(hf_folder(f"{url}?rank={dist.get_rank()}")).source)
    return {name: tensor.numpy() for name, tensor in local_tensors(model)}


def test_ranks_read_only_their_slices_of_a_url(pair: Processes, tmp_path: Path) -> None:
    """Counted by the server: of a matrix whose columns are split a rank reads all rows, of the rest its own."""
    folder, config = save_weights("glm4v_moe", tmp_path / "folder"), small_config("glm4v_moe")
    parallel = ParallelConfig(tensor_model_parallel_size=2, expert_model_parallel_size=2)
    local = pair.run(tensors_of_rank, config=config, parallel=parallel, folder=folder)
    with RangeServer(folder) as server:
        ranks = pair.run(tensors_from_url, config=config, parallel=parallel, url=server.url, cache=tmp_path / "cache")
    assert server.whole == {"config.json": 1, "generation_config.json": 1}, "once for both ranks"
    shapes = {weight.name: weight.shape for weight in weights(config)}
    file = folder / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    for rank, (found, expected) in enumerate(zip(ranks, local, strict=True)):
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], expected[name]) for name in found)
        read = sum(held.nbytes * (1 if held.shape[1:] == shapes[name][1:] else 2) for name, held in found.items())
        assert server.sent[f"rank={rank}", file.name] == 1 + header + read
        assert read < 0.7 * file.stat().st_size


# --- weights that do not fit ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_weights("glm4v_moe", tmp_path_factory.mktemp("tiny_moe"))


MISFITS: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "missing": ({"lm_head.weight": None}, "missing: lm_head.weight"),
    "a multi-token prediction layer": (
        {"model.layers.46.eh_proj.weight": torch.zeros(2)},
        "unknown: model.layers.46.eh_proj.weight",
    ),
    "mis-shaped": (
        {"model.visual.downsample.bias": torch.zeros(127)},
        r"of another shape: model.visual.downsample.bias is \[127\], not \[128\]",
    ),
}


@pytest.mark.fast
@pytest.mark.parametrize("case", MISFITS)
def test_tensors_that_do_not_fit_are_named(case: str, single_process: None, moe_folder: Path) -> None:
    changes, message = MISFITS[case]
    model = GlmvModel(GlmvConfig.from_hf(moe_folder), ParallelConfig())
    with pytest.raises(WeightsError, match=message):
        load_weights([model], altered(SafetensorsFolder(moe_folder), changes))


@pytest.mark.fast
def test_model_without_a_part_is_refused(single_process: None) -> None:
    config = GlmvConfig.from_preset("tiny_moe")
    model = GlmvModel(config, ParallelConfig())
    del model.adapter
    with pytest.raises(WeightsError, match=r"the model lacks adapter.proj.weight"):
        load_weights([model], RandomWeights(config, 0))


@pytest.mark.fast
def test_parameter_without_a_row_is_refused(single_process: None) -> None:
    config = GlmvConfig.from_preset("tiny_dense")
    model = GlmvModel(config, ParallelConfig())
    model.adapter.extra = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(WeightsError, match=r"adapter\.extra has no row"):
        load_weights([model], RandomWeights(config, 0))


# --- folders ----------------------------------------------------------------------------------------------------------


def sharded_copy(source: Path, folder: Path, max_shard_bytes: int = 1_000_000) -> Path:
    folder.mkdir()
    given = SafetensorsFolder(source)
    job = HfJob(
        given,
        dtype_of=given.dtype,
        max_shard_bytes=max_shard_bytes,
        block_bytes=2**20,
        checksum="xxh3",
        identity={},
        hf_files=lambda folder: None,
    )
    job.begin(folder)
    job.finish(folder, [job.write(number, folder, lambda nbytes: None) for number in range(len(job.portions))])
    return folder


@pytest.mark.fast
def test_shards_and_index_equal_those_of_transformers(moe_folder: Path, tmp_path: Path) -> None:
    folder = sharded_copy(moe_folder, tmp_path / "sharded")
    shutil.copy(moe_folder / "config.json", folder)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 5
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all((folder / shard).stat().st_size < 1_100_000 for shard in shards)
    assert not list(folder.glob("*.tmp")) + list(folder.glob(".*"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * number_of_values(GlmvConfig.from_hf(moe_folder))
    with safe_open(folder / shards[0], framework="pt") as shard:
        assert shard.metadata() == {"format": "pt"}
    given, reread = SafetensorsFolder(moe_folder), SafetensorsFolder(folder)
    assert sorted(given.names()) == sorted(reread.names())
    loaded, report = transformers.AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded.lm_head.weight, given.tensor("lm_head.weight"))


def remove_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[2].unlink()


def truncate_shard(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])


def alter_index(folder: Path, key: str, value: str | None) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    if value is None:
        del index["weight_map"][key]
    else:
        index["weight_map"][key] = value
    path.write_text(json.dumps(index))


BAD_FOLDERS = {
    "a missing shard": (remove_shard, r"lacks model-00003-of-000\d\d.safetensors, which .* names"),
    "a truncated shard": (
        truncate_shard,
        r"model-00002-of-.* cannot be read as safetensors .*copy or download it again",
    ),
    "an index with a tensor too many": (
        lambda folder: alter_index(folder, "lm_head.bias", "model-00001-of-00011.safetensors"),
        "lists tensors that its shards do not hold: lm_head.bias",
    ),
    "an index with a tensor missing": (
        lambda folder: alter_index(folder, "model.visual.downsample.bias", None),
        "does not list tensors that its shards hold: model.visual.downsample.bias",
    ),
    "an index that names another folder": (
        lambda folder: alter_index(folder, "lm_head.weight", "../model.safetensors"),
        "'../model.safetensors', which is not a file of its own folder",
    ),
    "an index that names no file": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": 5}}'),
        "names the shard 5, which is not a file of its own folder",
    ),
    "a file that is not an index": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
        "is not an index of safetensors shards",
    ),
    "no weights": (
        lambda folder: [path.unlink() for path in folder.iterdir()],
        "has neither model.safetensors nor model.safetensors.index.json",
    ),
}


@pytest.mark.fast
@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folder_is_refused_by_name(case: str, moe_folder: Path, tmp_path: Path) -> None:
    damage, message = BAD_FOLDERS[case]
    folder = sharded_copy(moe_folder, tmp_path / "folder")
    damage(folder)
    with pytest.raises(WeightsError, match=message):
        SafetensorsFolder(folder)


@pytest.mark.fast
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_value_that_is_not_finite_is_named(
    dtype: torch.dtype, value: float, moe_folder: Path, single_process: None, tmp_path: Path
) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(moe_folder / "model.safetensors").items()}
    tensors["model.visual.downsample.bias"][5] = value
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = GlmvModel(GlmvConfig.from_hf(moe_folder), ParallelConfig())
    with pytest.raises(WeightsError, match=r"tensor model\.visual\.downsample\.bias has values that are not finite"):
        load_weights([model], SafetensorsFolder(tmp_path))


@pytest.mark.fast
def test_a_value_in_float8_that_is_no_number_is_found() -> None:
    values = torch.ones(10).to(torch.float8_e4m3fn)
    assert nonfinite({"right": values}) == []
    values[3] = torch.nan
    assert nonfinite({"wrong": values}) == ["wrong"]


@pytest.mark.fast
def test_sum_that_overflows_is_not_taken_for_a_value_that_does() -> None:
    largest = torch.full((1000,), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16)
    assert not largest.sum().isfinite()
    assert nonfinite({"largest": largest, "infinite": largest * 2}) == ["infinite"]
