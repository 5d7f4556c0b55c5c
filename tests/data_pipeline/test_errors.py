"""BadSample from another process, and the record of a sample that was not used."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest

from data_pipeline.errors import BadSample, UnusedSample

pytestmark = pytest.mark.fast


def fail() -> None:
    raise BadSample("checksum", "its image differs")


def test_bad_sample_reaches_another_process_whole() -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        error = pool.submit(fail).exception()
    assert isinstance(error, BadSample)
    assert (error.reason, error.detail, str(error)) == ("checksum", "its image differs", "checksum: its image differs")


def test_unused_sample_omits_fields_that_do_not_apply() -> None:
    assert UnusedSample("no_caption", "1.jpg has no text", origin="pets/1.jpg").as_json() == {
        "reason": "no_caption",
        "detail": "1.jpg has no text",
        "origin": "pets/1.jpg",
    }
    quarantined = UnusedSample("checksum", "its image differs", shard="a.tar", key="7", step=0, replaced_by="")
    assert quarantined.as_json() == {
        "reason": "checksum",
        "detail": "its image differs",
        "shard": "a.tar",
        "key": "7",
        "step": 0,
        "replaced_by": "",
    }
