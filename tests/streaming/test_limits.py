"""Conversions stay within their memory, whatever the size of the model; limits that cannot work are refused."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors import safe_open

from benchmarks.conversion import Run, measured
from common.sizes import parse_size
from model.config import GlmvConfig
from model.errors import ConfigError
from streaming.limits import BLOCKS, LARGEST_BLOCK, Limits, plan_limits, resident_bytes
from tests.processes import Processes
from tests.streaming import adapter_cases
from tests.streaming.wide import save_sparse, save_wide, wide_config

CONVERT = [sys.executable, "-m", "tools.convert"]
MOST = 1.1  # of the limit


def convert_in(limit: str, *arguments: str | Path) -> Run:
    run = measured([*CONVERT, *map(str, arguments), "--max-memory", limit], cold=False)
    assert run.peak <= MOST * parse_size(limit), f"{run.peak / 2**20:,.0f} MiB of {limit}"
    return run


def weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def checksums_of(folder: Path) -> dict[str, str]:
    """Checksums of all tensors, by the safetensors library."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no dict
                stored = file.get_tensor(name)
                found[name] = xxhash.xxh3_64_hexdigest(stored.view(-1).view(torch.uint8).numpy())
    return found


def round_trip(config: GlmvConfig, root: Path, limit: str, least_bytes: float) -> list[Run]:
    """Import and export; what was read is removed, so that the disk holds two models at a time."""
    save_wide(config, root / "hf")
    assert weight_bytes(root / "hf") > least_bytes
    expected = checksums_of(root / "hf")
    runs = [convert_in(limit, "import", "--hf", root / "hf", "--out", root / "checkpoint")]
    shutil.rmtree(root / "hf")
    runs.append(convert_in(limit, "export", "--checkpoint", root / "checkpoint", "--out", root / "exported"))
    shutil.rmtree(root / "checkpoint")
    assert checksums_of(root / "exported") == expected
    written = json.loads((root / "exported" / "checksums.json").read_text())["tensors"]
    assert {name: entry["xxh3_64"] for name, entry in written.items()} == expected
    shutil.rmtree(root / "exported")
    return runs


def test_model_larger_than_its_memory(tmp_path: Path) -> None:
    config = wide_config("glm41v_9b", layers=2, vision_layers=1, vocab_size=8192)
    round_trip(config, tmp_path, "1100MiB", 1.3 * 2**30)


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "gigabytes"), [(6, 5.0), (40, 20.0)])
def test_full_widths(layers: int, gigabytes: float, tmp_path: Path) -> None:
    config = wide_config("glm41v_9b", layers=layers, vision_layers=24, vocab_size=151_552)
    round_trip(config, tmp_path, "2GiB", gigabytes * 10**9)


@pytest.mark.slow
def test_merge_of_a_model_larger_than_its_memory(tmp_path: Path) -> None:
    """With adapters beside every linear layer; the bytes are those of other processes without a limit."""
    hf = save_wide(wide_config("glm41v_9b", layers=2, vision_layers=1, vocab_size=8192), tmp_path / "hf")
    assert weight_bytes(hf) > 1.3 * 2**30
    with Processes(1) as process:
        process.run(
            adapter_cases.save,
            hf_files=str(hf),
            init_from=str(hf),
            checkpoint=str(tmp_path / "adapters"),
            lora={"rank": 32, "targets": ["all-linear"]},
            dtype=torch.bfloat16,
        )
    adapters = ["--checkpoint", str(tmp_path / "adapters")]
    convert_in("1GiB", "merge", *adapters, "--out", tmp_path / "merged")
    convert_in("1GiB", "export-lora", *adapters, "--out", tmp_path / "peft")
    convert_in("100GiB", "merge", *adapters, "--out", tmp_path / "expected", "--processes", "3")
    found, expected = checksums_of(tmp_path / "merged"), checksums_of(tmp_path / "expected")
    assert found == expected != checksums_of(hf)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    """GLM-4.5V's widths with all 128 experts, of one and two such layers."""
    peaks = []
    for layers in (2, 3):
        root = tmp_path / str(layers)
        hf = save_sparse(wide_config("glm45v", layers=layers, vision_layers=1, vocab_size=8192), root / "hf")
        peaks.append(convert_in("2GiB", "import", "--hf", hf, "--out", root / "checkpoint").peak)
        shutil.rmtree(root)
    assert peaks[1] <= 1.05 * peaks[0]


def test_limits_that_cannot_work() -> None:
    for limit, processes, message in (
        ("2 apples", 0, "--max-memory: '2 apples' is not a size"),
        (
            "100MiB",
            0,
            r"--max-memory 100MiB is too little: Python and its libraries take [\d,]+ MiB in each of 2 processes",
        ),
        ("2GiB", 64, r"in each of 65 processes; give [\d,]+ MiB or more, or fewer --processes"),
        ("2GiB", -1, "--processes -1: give 1 or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            plan_limits(limit, processes)


def test_blocks_fit_into_the_limit() -> None:
    base = resident_bytes(os.getpid())
    for times in (3, 6, 100):
        limit = times * base
        limits = plan_limits(str(limit), 0)
        assert base + limits.processes * (base + BLOCKS * limits.block_bytes) <= limit * 1.01
        assert limits.block_bytes <= LARGEST_BLOCK
    assert plan_limits("", 3) == Limits(sys.maxsize, 3, LARGEST_BLOCK)


def test_blocks_hold_the_fewest_rows_that_can_be_converted() -> None:
    smallest = 7 * 2**20
    needed = 2 * resident_bytes(os.getpid()) + BLOCKS * 2**23
    assert plan_limits(f"{needed // 2**20 + 8}MiB", 1, smallest).block_bytes == 2**23
    with pytest.raises(ConfigError, match=r"give [\d,]+ MiB or more"):
        plan_limits(f"{needed // 2**20 - 8}MiB", 1, smallest)
