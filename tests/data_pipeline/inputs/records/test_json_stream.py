"""JSON lists read as a stream: the same values as json.loads gives, where they lie, and little memory."""

from __future__ import annotations

import io
import json
import random
import tracemalloc
from typing import Any

import pytest

from data_pipeline.errors import DataError
from data_pipeline.inputs.records import json_stream, jsonl
from data_pipeline.inputs.records.json_stream import first_keys, values
from tests.data_pipeline.inputs.reading import opened, read

pytestmark = pytest.mark.fast


def any_value(rng: random.Random, depth: int = 0) -> Any:
    """Return a random value, with the characters that JSON and UTF-8 treat in their own ways."""
    kind = rng.randrange(5 if depth > 3 else 7)
    if kind == 5:
        return [any_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 6:
        return {f"k{number}": any_value(rng, depth + 1) for number in range(rng.randrange(4))}
    text = "".join(rng.choice('ab"\\[]{},:\n é数😀\ud83d\u2028') for _ in range(rng.randrange(60)))
    return (text, rng.randrange(10**12), rng.random() * 1e9, rng.choice((True, False, None)), -rng.randrange(9))[kind]


@pytest.mark.parametrize("window", [1, 3, 7, 64, 1 << 20])
def test_values_and_their_bytes_equal_those_of_json(monkeypatch, window):
    monkeypatch.setattr(json_stream, "WINDOW_BYTES", window)
    rng = random.Random(0)
    for number in range(60):
        given = [any_value(rng) for _ in range(rng.randrange(12))]
        ascii_only, indent = bool(number % 2), rng.choice((None, 1, "\t"))
        data = json.dumps(given, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "surrogatepass") + b" \n"
        found = list(values(io.BytesIO(data), data.index(b"[") + 1, len(data)))
        assert [value.value for value in found] == given == json.loads(data)
        assert [json.loads(data[value.start : value.stop]) for value in found] == given
        if found:  # some of them alone
            first, last = sorted(rng.choices(range(len(found)), k=2))
            part = values(io.BytesIO(data), found[first].start, found[last].stop, whole=False)
            assert [value.value for value in part] == given[first : last + 1]


@pytest.mark.parametrize("window", [1, 5, 1 << 20])
@pytest.mark.parametrize(
    "data",
    [
        b"[1, 2",
        b'[{"a": 1}, {"a": 2]',
        b"[1 2]",
        b"[1,]",
        b"[1] [2]",
        b'["abc',
        b'["a\\u12"]',
        b"[tru]",
        b'["\xff"]',
        b'["\xc3',
        b'["a\nb"]',
        b"[1, 2}",
    ],
)
def test_damaged_list_is_refused_as_json_refuses_it(tmp_path, monkeypatch, data, window):
    monkeypatch.setattr(json_stream, "WINDOW_BYTES", window)
    with pytest.raises(ValueError, match=r"."):
        json.loads(data)
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.json is not valid JSON \(.*(byte|UTF-8).*\): fix it, or write one object"):
        len(opened(tmp_path / "a.json").units())


def test_values_without_commas_are_read(monkeypatch):
    monkeypatch.setattr(json_stream, "WINDOW_BYTES", 2)
    data = b' {"a": [1]}\n{"b": 2}  3\n'
    found = list(values(io.BytesIO(data), 0, len(data), commas=False))
    assert [value.value for value in found] == [{"a": [1]}, {"b": 2}, 3]


def test_first_keys_are_found_in_the_beginning_of_an_object():
    assert first_keys(b'{"version": 1, "data": [{"te') == [("version", "1"), ("data", "[{")]
    assert first_keys(b'{"a": [[1], {}], "b": {"c": []}, "d": "x') == [("a", "[["), ("b", "{"), ("d", '"')]
    assert first_keys(b"[1]") == []


def test_list_is_read_with_little_memory_and_its_first_unit_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "WINDOW_BYTES", 1 << 14)
    monkeypatch.setattr(jsonl, "UNIT_BYTES", 1 << 16)
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": f"{number} " + "word " * 200} for number in range(4000)]))  # 4 MB
    given = opened(path)
    tracemalloc.start()
    count = sum(1 for unit in given.units() for _ in given.read(unit))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 4000
    assert peak < 1 << 20
    with open(path, "r+b") as file:  # damage behind the first unit is not seen by who asks for that unit alone
        file.seek(-10, 2)
        file.write(b'"}}')
    assert next(iter(given.units())).extra["entry"] == 1
    with pytest.raises(DataError, match="not valid JSON"):
        read(given)
