"""A checkpoint of either end of the tested versions loads with the other, in another layout, bit for bit.

`make test-new` installs both ends beside the environment, so that one Python has them: megatron-core 0.17 and later
declare Python 3.12, and run on 3.11.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.model.test_layouts import variant_of
from tests.new import cases, engine_cases
from tests.processes import Processes

ROOT = Path(__file__).parents[2]
INSTALLED = ROOT / ".venv-new"
ENGINES = {"oldest": ROOT / ".venv-te", "newest": INSTALLED / "engine"}
VERSIONS = {"oldest": ("0.16.1", "2.11.0"), "newest": ("0.19.2", "2.20.2")}
OTHER = {"oldest": "newest", "newest": "oldest"}
SECONDS = 400  # for a call: the first one of a process imports everything

# Which version saves, processes and layout that save, processes and layout that load.
MOE = [
    ("oldest", (1, ""), (2, "EP2")),
    ("newest", (1, ""), (2, "TP2 SP")),
    ("oldest", (2, "TP2 SP"), (2, "EP2")),
    ("newest", (2, "TP2 SP"), (2, "PP2 VPP2")),
    ("oldest", (2, "EP2"), (2, "ETP2")),
    ("newest", (2, "EP2"), (2, "CP2")),
    ("oldest", (2, "PP2 stages=Et|tttL"), (1, "")),
    ("newest", (2, "PP2 VPP2"), (1, "")),
    ("newest", (2, "ETP2"), (2, "DP2")),
]
DENSE = [
    ("oldest", (2, "TP2"), (2, "PP2")),
    ("newest", (2, "PP2 VPP2"), (2, "TP2 vision=tensor")),
    ("oldest", (2, "DP2"), (2, "CP2")),
    ("newest", (2, "CP2"), (1, "")),
]
FAST = (("glm4v_moe", MOE[2]), ("glm4v_moe", MOE[3]), ("glm4v", DENSE[0]))
PAIRS = [
    pytest.param(
        variant,
        *pair,
        id=f"{variant}, {pair[0]} {pair[1][1] or 'one process'} to {pair[2][1] or 'one process'}",
        marks=pytest.mark.fast if (variant, pair) in FAST else (),
    )
    for variant, pairs in (("glm4v_moe", MOE), ("glm4v", DENSE))
    for pair in pairs
]


@pytest.fixture(scope="module")
def ends() -> Iterator[dict[tuple[str, int], Processes]]:
    """Groups of processes by version and size."""
    assert (INSTALLED / "installed").is_file(), "run `make test-new`, which installs both versions"
    with (
        Processes(1, [INSTALLED / "oldest"]) as oldest_one,
        Processes(2, [INSTALLED / "oldest"]) as oldest_two,
        Processes(1, [INSTALLED / "newest"]) as newest_one,
        Processes(2, [INSTALLED / "newest"]) as newest_two,
    ):
        yield {
            ("oldest", 1): oldest_one,
            ("oldest", 2): oldest_two,
            ("newest", 1): newest_one,
            ("newest", 2): newest_two,
        }


@pytest.fixture(scope="module")
def saved(
    ends: dict[tuple[str, int], Processes], hf_folder: tuple[Path, nn.Module], tmp_path_factory: pytest.TempPathFactory
):
    """Checkpoints of trained runs, made once for each version and layout."""
    made: dict[tuple[str, int, str, str], Path] = {}

    def checkpoint(version: str, size: int, layout: str, dtype: str = "float32") -> Path:
        key = version, size, layout, dtype
        if key not in made:
            made[key] = tmp_path_factory.mktemp("saved") / "step_0000002"
            ends[version, size].run(
                cases.train_and_save,
                timeout=SECONDS,
                **of(hf_folder),
                layout=layout,
                checkpoint=str(made[key]),
                dtype=dtype,
            )
        return made[key]

    return checkpoint


def of(hf_folder: tuple[Path, nn.Module]) -> dict[str, Any]:
    return {"variant": variant_of(hf_folder), "folder": str(hf_folder[0])}


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint, whole, by torch alone."""
    reader = FileSystemReader(checkpoint / "state")
    described = reader.read_metadata().state_dict_metadata
    state: dict[str, Any] = {}
    for key, kind in described.items():
        assert isinstance(kind, TensorStorageMetadata), key
        state[key] = torch.empty(kind.size, dtype=kind.properties.dtype)
    torch_checkpoint.load(state, storage_reader=reader, no_dist=True)
    return state


def assert_equal_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert tensor.dtype == found[key].dtype, key
        assert torch.equal(tensor.view(torch.uint8), found[key].view(torch.uint8)), key


@pytest.mark.fast
def test_the_processes_have_both_ends(ends: dict[tuple[str, int], Processes]) -> None:
    for (version, _), processes in ends.items():
        assert set(processes.run(cases.version, timeout=SECONDS)) == {VERSIONS[version][0]}


@pytest.mark.parametrize(("hf_folder", "version", "before", "after"), PAIRS, indirect=["hf_folder"])
def test_checkpoint_loads_with_the_other_version(
    ends: dict[tuple[str, int], Processes],
    hf_folder,
    saved,
    tmp_path: Path,
    version: str,
    before: tuple[int, str],
    after: tuple[int, str],
) -> None:
    source, target = saved(version, *before), tmp_path / "step_0000002"
    size, layout = after
    ends[OTHER[version], size].run(
        cases.load_and_save, timeout=SECONDS, **of(hf_folder), layout=layout, source=str(source), target=str(target)
    )
    expected = tensors(source)
    assert any(key.startswith("optimizer.") for key in expected)
    assert_equal_bits(tensors(target), expected)


@pytest.mark.parametrize("version", ["oldest", "newest"])
@pytest.mark.parametrize("hf_folder", ["glm4v_moe"], indirect=True)
def test_bf16_run_with_another_learning_rate(
    ends: dict[tuple[str, int], Processes], hf_folder, saved, tmp_path: Path, version: str
) -> None:
    """Its main weights and moments are float32. Rates belong to the configuration, steps to the checkpoint."""
    source, target = saved(version, 2, "TP2 SP", "bfloat16"), tmp_path / "step_0000002"
    answers = ends[OTHER[version], 2].run(
        cases.load_and_save,
        timeout=SECONDS,
        **of(hf_folder),
        layout="EP2",
        source=str(source),
        target=str(target),
        dtype="bfloat16",
        lr=3e-4,
    )
    assert all(group == (2, 3e-4) for groups in answers for group in groups)
    assert_equal_bits(tensors(target), tensors(source))


@pytest.mark.parametrize("version", ["oldest", "newest"])
def test_modules_of_transformer_engine_load_the_other_version(hf_folder, saved, tmp_path: Path, version: str) -> None:
    """Weights of the torch backend go into the other version's fused modules, and back, bit for bit."""
    source, target = saved(version, 1, ""), tmp_path / "step_0000002"
    other = OTHER[version]
    packages = [INSTALLED / other, ENGINES[other], ENGINES["oldest"]]  # the last has what both engines import
    with Processes(1, packages) as process:
        assert process.run(engine_cases.versions, timeout=SECONDS) == [VERSIONS[other]]
        process.run(
            engine_cases.load_and_save_weights,
            timeout=SECONDS,
            folder=str(hf_folder[0]),
            source=str(source),
            target=str(target),
        )
    weights = {key: tensor for key, tensor in tensors(source).items() if not key.startswith("optimizer.")}
    assert_equal_bits(tensors(target), weights)


@pytest.mark.parametrize("hf_folder", ["glm4v"], indirect=True)
def test_changed_bit_is_noticed(hf_folder, saved, tmp_path: Path) -> None:
    """The comparison itself: a copy with one changed bit of one tensor differs."""
    source = saved("oldest", 1, "")
    shutil.copytree(source, tmp_path / "copy")
    found = tensors(tmp_path / "copy")
    assert_equal_bits(found, tensors(source))
    key = next(key for key in found if key.startswith("optimizer."))
    found[key].view(torch.int32).flatten()[0] ^= 1
    with pytest.raises(AssertionError, match=key):
        assert_equal_bits(found, tensors(source))
