"""Published folders: equal to exports of a checkpoint, from every layout, within little memory.

The files are read with the safetensors library, and the folders loaded by transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from tests.hf_folders import VARIANTS, save_whole_folder
from tests.peft_reference import peft_model, save_adapters
from tests.processes import Processes
from tests.reference import published_tensors, save_transformers_model, small_config
from tests.rl import publishing_cases
from tools.conversion import export_checkpoint

MOE, DENSE = VARIANTS
LAYOUTS = [
    (MOE, 4, "TP2 SP PP2 EP2", "float32"),
    (DENSE, 4, "TP2 PP2", "bfloat16"),
]
OTHER_LAYOUTS = [
    (MOE, 4, "TP2 SP PP2 EP2", "bfloat16"),
    (MOE, 4, "EP2 ETP2", "float32"),
    (MOE, 4, "TP2 SP CP2 vision=tensor", "float32"),
    (MOE, 2, "PP2 VPP2", "float32"),
    (MOE, 2, "DP2", "float32"),
    (MOE, 1, "", "float32"),
    (DENSE, 2, "TP2 vision=tensor", "float32"),
    (DENSE, 2, "CP2", "float32"),
]


@pytest.fixture(scope="module")
def processes() -> Iterator[Callable[[int], Processes]]:
    """Return a function that gives a group of processes, which is started when it is first asked for."""
    with ExitStack() as started:
        yield cache(lambda size: started.enter_context(Processes(size)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {variant: save_whole_folder(variant, tmp_path_factory.mktemp(variant)) for variant in VARIANTS}


def read(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder with an index, which must name exactly what the shards hold."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        held = load_file(file)
        assert {name for name, where in index["weight_map"].items() if where == file.name} == set(held)
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt", "version": index["metadata"]["version"]}
        tensors |= held
    assert sum(tensor.nbytes for tensor in tensors.values()) == index["metadata"]["total_size"]
    return tensors


def same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("variant", "size", "layout", "dtype"),
    [*LAYOUTS, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHER_LAYOUTS)],
)
def test_published_folder_equals_an_export_of_the_checkpoint(
    processes: Callable[[int], Processes],
    folders: dict[str, Path],
    tmp_path: Path,
    variant: str,
    size: int,
    layout: str,
    dtype: str,
) -> None:
    out, checkpoint = tmp_path / "version_3", tmp_path / "step_0000001"
    streams = processes(size).run(
        publishing_cases.publish,
        variant=variant,
        folder=str(folders[variant]),
        layout=layout,
        out=str(out),
        checkpoint=str(checkpoint),
        dtype=dtype,
    )
    export_checkpoint(checkpoint, tmp_path / "exported")
    tensors, exported = read(out), load_file(tmp_path / "exported" / "model.safetensors")
    same_bits(tensors, exported)
    assert (out / "config.json").read_bytes() == (tmp_path / "exported" / "config.json").read_bytes()
    assert (out / "tokenizer.json").read_bytes() == (folders[variant] / "tokenizer.json").read_bytes()
    assert len(list(out.glob("*.safetensors"))) == size, "every process writes a shard"
    assert {path.name for path in tmp_path.iterdir()} == {"version_3", "step_0000001", "exported"}
    assert all(stream == streams[0] for stream in streams)
    assert streams[0] == {name: publishing_cases.hash_of(tensor) for name, tensor in exported.items()}


def test_transformers_loads_trained_weights_from_a_published_folder(
    processes: Callable[[int], Processes], folders: dict[str, Path], tmp_path: Path
) -> None:
    folder, out = folders[MOE], tmp_path / "version_3"
    layout = "TP2 SP PP2 EP2"
    processes(4).run(publishing_cases.publish, variant=MOE, folder=str(folder), layout=layout, out=str(out))
    model, report = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    published = read(out)
    for name, parameter in published_tensors(model.named_parameters()):
        assert torch.equal(parameter, published[name]), name
    before = load_file(folder / "model.safetensors")
    assert [name for name in before if torch.equal(before[name], published[name])] == [], "not those before the step"


@pytest.mark.parametrize(
    ("variant", "targets", "size", "layout"),
    [
        (MOE, "all", 4, "TP2 SP PP2 EP2"),
        (DENSE, "all dense", 4, "TP2 PP2"),
        pytest.param(MOE, "some", 4, "TP2 SP PP2 vision=tensor", marks=pytest.mark.slow),
        pytest.param(MOE, "all", 1, "", marks=pytest.mark.slow),
    ],
)
def test_adapters_are_merged_as_by_peft(
    processes: Callable[[int], Processes], tmp_path: Path, variant: str, targets: str, size: int, layout: str
) -> None:
    base, out = tmp_path / "base", tmp_path / "version_0"
    save_transformers_model(small_config(variant), base)
    (base / "tokenizer.json").touch()
    adapted = peft_model(variant, targets)
    torch.save(save_adapters(adapted, tmp_path / "peft"), tmp_path / "adapters.pt")
    streams = processes(size).run(
        publishing_cases.publish_adapters,
        variant=variant,
        folder=str(base),
        layout=layout,
        targets=targets,
        adapters=str(tmp_path / "adapters.pt"),
        out=str(out),
    )
    found, before = read(out), load_file(base / "model.safetensors")
    assert streams == [{name: publishing_cases.hash_of(tensor) for name, tensor in found.items()}] * size
    changed = 0
    for name, tensor in published_tensors(adapted.merge_and_unload().named_parameters()):
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
        changed += not torch.equal(tensor, before[name])
    assert changed > 3


def test_error_of_one_process_ends_all_and_leaves_nothing(
    processes: Callable[[int], Processes], folders: dict[str, Path], tmp_path: Path
) -> None:
    case: dict[str, Any] = {
        "variant": "glm4v",
        "folder": str(folders["glm4v"]),
        "layout": "TP2 PP2",
        "out": str(tmp_path / "version_3"),
    }
    errors = processes(4).run(publishing_cases.publish_error, max_file_bytes=100_000, **case)
    for error in errors:
        assert error.startswith(f"cannot publish version 3 of the weights in {tmp_path}/version_3: model-0000")
        assert "File too large" in error
    assert list(tmp_path.iterdir()) == []
    assert processes(4).run(publishing_cases.publish_error, max_file_bytes=10**9, **case) == [""] * 4


def test_folder_of_the_same_version_is_replaced(
    processes: Callable[[int], Processes], folders: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "version_3"
    out.mkdir()
    (out / "model-00001-of-00009.safetensors").write_text("old")
    case: dict[str, Any] = {"variant": "glm4v", "folder": str(folders["glm4v"]), "layout": "TP2 PP2", "out": str(out)}
    processes(4).run(publishing_cases.publish, **case)
    assert len(list(out.glob("*.safetensors"))) == 4
    read(out)


def test_memory_beside_the_model_is_below_twice_the_largest_tensor(
    processes: Callable[[int], Processes], folders: dict[str, Path], tmp_path: Path
) -> None:
    """The owner of the embedding needs the embedding and the slice that the other tensor rank sends."""
    answers = processes(4).run(
        publishing_cases.extra_memory,
        variant="glm4v_moe",
        layout="TP2 SP PP2 EP2",
        vocab_size=2**18,
        folder=str(folders["glm4v_moe"]),
        out=str(tmp_path / "version_1"),
    )
    largest = answers[0]["largest"]
    assert largest == 2**27
    grown = [answer["grown"] / largest for answer in answers]
    assert max(grown) < 2, grown
    assert max(grown) > 1.2, "the measurement must see what the owner holds"
