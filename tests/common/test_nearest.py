"""Suggestions for unknown names."""

from __future__ import annotations

import pytest

from common.nearest import nearest, suggestion

pytestmark = pytest.mark.fast


def test_nearest_is_none_where_no_name_is_near() -> None:
    assert nearest("jsnol", ["jsonl", "parquet"]) == "jsonl"
    assert nearest("foo", ["moe", "data"]) is None
    assert (suggestion("jsnol", ["jsonl"]), suggestion("foo", ["moe"])) == (": did you mean jsonl?", "")
