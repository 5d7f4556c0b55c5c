"""Portions of an export in FP8 are written in any order and again, as a resumed export does, with the same bytes."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from model.weights.formats.block_fp8 import SCALE, BlockQuantised
from streaming.hf_job import HfJob
from tests.model.test_block_fp8 import InMemory, matrix, reference

WEIGHTS = {f"{number}.weight": matrix((300 + 128 * number, 256)) for number in range(8)}


def fp8_job(names: list[str]) -> HfJob:
    source = BlockQuantised(InMemory(**WEIGHTS), names)
    return HfJob(
        source,
        dtype_of=source.dtype,
        max_shard_bytes=400_000,
        block_bytes=2**13,
        checksum="xxh3",
        identity={},
        hf_files=lambda folder: None,
        row_multiple=128,
    )


def test_portions_in_any_order_and_again(tmp_path: Path) -> None:
    job = fp8_job([*WEIGHTS])
    assert len(job.portions) > 3
    in_order = list(range(len(job.portions)))
    for name, order in (("once", in_order), ("again", [*in_order[::-1], *in_order[1:]])):
        folder = tmp_path / name
        folder.mkdir()
        job.begin(folder)
        results = {number: job.write(number, folder, lambda nbytes: None) for number in order}
        job.finish(folder, [results[number] for number in in_order])
    files = sorted(path.name for path in (tmp_path / "once").iterdir())
    assert len(files) > 3
    for file in files:
        assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file
    found = {name: each for file in (tmp_path / "once").glob("*.safetensors") for name, each in load_file(file).items()}
    assert found.keys() == {*WEIGHTS, *(name + SCALE for name in WEIGHTS)}
    for name, weight in WEIGHTS.items():
        values, scales = reference(weight)
        assert torch.equal(found[name].view(torch.uint8), values.view(torch.uint8)), name
        assert torch.equal(found[name + SCALE], scales), name


def test_what_is_converted_is_in_the_identity() -> None:
    """So that a killed export with another option is not resumed."""
    names = [*WEIGHTS]
    assert fp8_job(names).identity == fp8_job(names).identity != fp8_job(names[1:]).identity
