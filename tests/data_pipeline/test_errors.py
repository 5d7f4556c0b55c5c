"""BadSample across processes, and the record of a sample that was not used."""

from __future__ import annotations

import pickle

import pytest

from data_pipeline.errors import BadSample, UnusedSample

pytestmark = pytest.mark.fast


def test_bad_sample_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(BadSample("checksum", "its image differs")))
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
