"""Processes that work on the same packs receive what one of them reads, or raise what it raises."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from data_pipeline.errors import BadSample
from model.process_groups import initialize_model_parallel, vision_groups
from tests.model.layout_cases import layout_of, packs_of_step
from tests.processes import Processes
from training.batch_broadcast import broadcast_batches, broadcast_patches, is_lead, without_patches

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with Processes(2) as two:
        yield two


def receive(layout: str) -> dict[str, Any]:
    """Return whether a process receives two packs that the lead has read, and their patches."""
    parallel, _ = layout_of(layout)
    initialize_model_parallel(parallel, seed=1)
    is_first_stage = parallel_state.is_pipeline_first_stage()
    if is_first_stage:
        vision_groups(parallel)  # as the model does; the other stage does not have these groups
    packs = packs_of_step("glm4v", 1)[:2]
    batches = broadcast_batches(lambda: packs)
    whole = list(broadcast_patches(batches)) if is_first_stage else batches
    return {
        "lead": is_lead(),
        "ids": all(torch.equal(got.input_ids, want.input_ids) for got, want in zip(batches, packs, strict=True)),
        "samples": [batch.sample_ids for batch in batches] == [pack.sample_ids for pack in packs],
        "patches": [torch.equal(got.patches, want.patches) for got, want in zip(whole, packs, strict=True)],
    }


@pytest.mark.parametrize("layout", ["PP2", "CP2", "TP2 SP"])
def test_all_receive_the_packs_and_the_first_stage_the_patches(processes: Processes, layout: str) -> None:
    answers = processes.run(receive, layout=layout)
    assert [answer["lead"] for answer in answers] == [True, False]
    for answer in answers:
        assert answer["ids"]
        assert answer["samples"]
    assert answers[0]["patches"] == [True, True]
    assert answers[1]["patches"] == ([False, True] if layout == "PP2" else [True, True])  # the second has no image


def test_no_pixel_is_sent_with_a_pack() -> None:
    """A slice of a tensor is pickled with all of its storage."""
    pack = packs_of_step("glm4v", 1)[0]
    others = sum(x.nbytes for name, x in vars(pack).items() if isinstance(x, torch.Tensor) and name != "patches")
    sent = len(pickle.dumps(without_patches(pack)))
    assert others < sent < others + 10_000 < others + pack.patches.nbytes


def fail_to_read(layout: str) -> str:
    initialize_model_parallel(layout_of(layout)[0], seed=1)

    def read() -> list[Any]:
        assert is_lead()
        raise BadSample("unreadable_image", "the second half is missing")

    try:
        broadcast_batches(read)
    except BadSample as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("layout", ["PP2", "CP2"])
def test_all_processes_raise_what_the_lead_raises(processes: Processes, layout: str) -> None:
    assert processes.run(fail_to_read, layout=layout) == ["unreadable_image: the second half is missing"] * 2
