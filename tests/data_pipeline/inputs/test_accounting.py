"""Randomly mutated inputs of every kind: no item is lost, and no name vanishes without a word.

Each case writes a valid input, then renames, adds, removes or damages some of its names. What the case wrote is counted
here, apart from the product, and compared with the accounts of reading.
"""

from __future__ import annotations

import copy
import io
import json
import random
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.errors import DataError
from data_pipeline.inputs.draft import Draft, NotRead, Rejected
from data_pipeline.inputs.kinds import open_inputs, skipped_files
from data_pipeline.sharding.accounting import Accounts
from data_pipeline.sharding.fields import unused_message_keys
from tests.data_pipeline.inputs.reading import JPEG, MP4, PNG

NEW_NAMES = (
    "img",
    "Image",
    "screenshot",
    "caption",
    "label",
    "weight",
    "input.jpg",
    "url",
    "id",
    "loss",
    "ключ",
    "a b",
)

WHOLE_ITEMS = ("member ", "annotation: ")  # names of items that are not read, with all that is in them


@dataclass
class Case:
    """One mutated input."""

    rng: random.Random
    folder: Path
    added: Counter[str] = field(default_factory=Counter)  # names that nothing can know, each with its number of items

    def new_name(self, items: int = 1) -> str:
        """Return a name that no kind knows."""
        name = f"zz{self.rng.randrange(10**9)}"
        self.added[name] += items
        return name

    def write(self, name: str, data: bytes | str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)

    def mutate(self, record: dict[str, Any]) -> dict[str, Any]:
        """Rename, add and remove keys of a record, at random."""
        record = dict(record)
        for _ in range(self.rng.choice((0, 1, 1, 2))):
            change = self.rng.choice(("rename", "add", "remove", "retype", "twice"))
            known = [key for key in record if key not in self.added]
            key = self.rng.choice(known) if known else ""
            if change == "add" or not known:
                record[self.new_name()] = self.rng.choice((1, "x", [1], {"a": 1}))  # null means absent
            elif change == "rename":
                record[self.rng.choice(NEW_NAMES)] = record.pop(key)
            elif change == "remove":
                del record[key]
            elif change == "retype":
                record[key] = self.rng.choice((7, "", None, [], {}, ["x"], {"x": 1}, True))
            else:
                record[f"{key}_2"] = record[key]
        return record


CHATS: tuple[dict[str, Any], ...] = (
    {
        "messages": [{"role": "user", "content": "<image>Hi"}, {"role": "assistant", "content": "Ho"}],
        "images": ["a.jpg"],
    },
    {"conversations": [{"from": "human", "value": "<image>Hi"}, {"from": "gpt", "value": "Ho"}], "image": "a.jpg"},
    {"instruction": "Hi", "input": "there", "output": "Ho", "history": [["a", "b"]]},
    {"domain": "chat", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
)
PROMPTS: tuple[dict[str, Any], ...] = (
    {
        "domain": "rl",
        "messages": [{"role": "user", "content": "<image>Hi"}],
        "images": ["a.jpg"],
        "reference": "Ho",
        "verifier": "exact",
        "tier": "hard",
    },
    {
        "prompt": [{"role": "user", "content": "<image>Hi"}],
        "images": ["a.jpg"],
        "data_source": "a/b",
        "ability": "vqa",
        "reward_model": {"style": "rule", "ground_truth": "Ho"},
        "extra_info": {"split": "train"},
        "verifier": "exact",
    },
    {"prompt": "Hi", "gt_answer": "<answer>Ho</answer>", "datasource": "vqa", "image_file": "a.jpg", "verifier": "x"},
)
RECORDS: tuple[dict[str, Any], ...] = (
    {"domain": "image_text", "text": "A cat.", "images": ["a.jpg"]},
    {"domain": "interleaved", "text": "x <image> y", "images": ["b.png"]},
    {"domain": "text", "text": "Words."},
    {"texts": ["A", None], "images": [None, "a.jpg"]},
    *CHATS,
    *PROMPTS,
)


def _records(case: Case) -> list[dict[str, Any]]:
    records = []
    for _ in range(case.rng.randint(1, 4)):
        record = case.mutate(copy.deepcopy(case.rng.choice(RECORDS)))
        for turns in (record.get("messages"), record.get("conversations"), record.get("prompt")):
            if isinstance(turns, list) and case.rng.random() < 0.5:
                turns[:] = [case.mutate(turn) if isinstance(turn, dict) else turn for turn in turns]
        records.append(record)
    return records


def jsonl(case: Case) -> dict[str, int]:
    case.write("a.jpg", JPEG)
    case.write("b.png", PNG)
    records = json.loads(json.dumps(_records(case)))
    if case.rng.random() < 0.3:
        case.write("given.json", json.dumps(records))
    else:
        lines = [json.dumps(record) for record in records]
        lines += ["{broken", "[1]"][: case.rng.randint(0, 2)]
        case.write("given.jsonl", "\n".join([*lines, "", ""]))
        return {"records": len(lines)}
    return {"records": len(records)}


def parquet(case: Case) -> dict[str, int]:
    rows = case.rng.randint(1, 5)
    columns: dict[str, list[Any]] = {
        "image": [{"bytes": JPEG, "path": "a.jpg"}] * rows,
        "text": ["A cat."] * rows,
        "id": list(range(rows)),
    }
    if case.rng.random() < 0.3:
        columns["blob"] = [b"\0\1"] * rows
    if case.rng.random() < 0.3:
        columns["second"] = [{"bytes": PNG, "path": None}] * rows
    for _ in range(case.rng.randint(0, 2)):
        key = case.rng.choice([name for name in columns if name not in case.added] or list(columns))
        name = case.new_name(rows) if case.rng.random() < 0.5 else case.rng.choice(NEW_NAMES)
        columns[name] = columns.pop(key) if case.rng.random() < 0.5 else columns[key]
    pq.write_table(pa.table(columns), case.folder / "given.parquet", row_group_size=2)
    return {"rows": rows}


def tars(case: Case) -> dict[str, int]:
    members: list[tuple[str, bytes]] = []
    for number in range(case.rng.randint(1, 4)):
        key = case.rng.choice((f"{number}", f"img_{number}.5", f"a/{number}", f"Track {number}.0 (Clean)"))
        members += [(f"{key}.jpg", JPEG), (f"{key}.txt", b"A cat.")][: case.rng.randint(1, 2)]
        if case.rng.random() < 0.5:
            members.append((f"{key}.json", json.dumps(case.mutate({"caption": "A cat."})).encode()))
    original = list(members)
    for _ in range(case.rng.randint(0, 2)):
        name, data = case.rng.choice(original)
        stem, dot, extension = name.rpartition(".")
        change = case.rng.choice(("unknown", "input", "other"))
        renamed = {"input": f"{stem}.input.{extension}", "other": f"other{dot}cls"}
        name_now = renamed.get(change) or f"{stem}.{case.new_name()}"
        if case.rng.random() < 0.5 and (name, data) in members:
            members.remove((name, data))
        members.append((name_now, data))
    with tarfile.open(case.folder / "given.tar", "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return {"members": len(members)}


def folder(case: Case) -> dict[str, int]:
    names = []
    for number in range(case.rng.randint(1, 4)):
        extension, data = case.rng.choice((("jpg", JPEG), ("png", PNG), ("mp4", MP4)))
        names.append((f"{number}.{extension}", data))
        names.append(case.rng.choice(((f"{number}.txt", b"A cat."), (f"{number}.json", b'{"text": "A cat."}'))))
    for _ in range(case.rng.randint(0, 2)):
        name, data = case.rng.choice(names)
        names.append((f"{case.rng.choice(('other', 'README'))}{Path(name).suffix}", data))
    names = list(dict(names).items())
    for name, data in names:
        case.write(f"images/{name}", data)
    return {"files": len(names)}


def grounding(case: Case) -> dict[str, int]:
    case.write("a.jpg", JPEG)
    phrase = {"start": 0, "end": 5, "boxes": [[1, 1, 20, 20]]}
    lines = [case.mutate({"image": "a.jpg", "caption": "A cat.", "phrases": [case.mutate(phrase)]}) for _ in range(3)]
    case.write("given.jsonl", "\n".join(map(json.dumps, lines)))
    return {"records": len(lines)}


def coco(case: Case) -> dict[str, int]:
    case.write("a.jpg", JPEG)
    images = [{"id": number, "file_name": "a.jpg", "width": 60, "height": 40} for number in range(3)]
    annotations = [
        case.mutate({"id": number, "image_id": number % 3, "category_id": 1, "bbox": [1, 1, 9, 9]})
        for number in range(5)
    ]
    categories = [{"id": 1, "name": "cat"}]
    content: dict[str, Any] = {"images": images, "annotations": annotations, "categories": categories}
    if case.rng.random() < 0.3:
        content[case.new_name()] = case.rng.choice(([], {}, 1))
    case.write("given.json", json.dumps(content))
    return {"images": 3, "annotations": 5}


def scene_text(case: Case) -> dict[str, int]:
    case.write("a.jpg", JPEG)
    word = {"text": "cat", "box": [1, 1, 20, 10]}
    lines = [case.mutate({"image": "a.jpg", "words": [case.mutate(word), word]}) for _ in range(3)]
    case.write("given.jsonl", "\n".join(map(json.dumps, lines)))
    return {"records": len(lines)}


def clips(case: Case) -> dict[str, int]:
    case.write("a.mp4", MP4)
    caption = {"start": 0.0, "end": 0.1, "text": "A van."}
    lines = [case.mutate({"video": "a.mp4", "captions": [case.mutate(caption), caption]}) for _ in range(2)]
    case.write("given.jsonl", "\n".join(map(json.dumps, lines)))
    return {"records": len(lines)}


# The kind -> (writer, the path below the folder that is given, the kind's name on the command line).
MAKERS: dict[str, tuple[Callable[[Case], dict[str, int]], str, str]] = {
    "jsonl": (jsonl, "given.json*", ""),
    "parquet": (parquet, "given.parquet", ""),
    "tars": (tars, "given.tar", ""),
    "folder": (folder, "images", "folder"),
    "grounding": (grounding, "given.jsonl", "grounding"),
    "coco": (coco, "given.json", "grounding"),
    "scene_text": (scene_text, "given.jsonl", "scene_text"),
    "clips": (clips, "given.jsonl", "clips"),
}


def check(maker: str, seed: int, folder: Path) -> None:
    """Write, mutate and read one input, and compare the accounts with what was written."""
    write, pattern, kind = MAKERS[maker]
    case = Case(random.Random(f"{maker} {seed}"), folder)
    folder.mkdir(parents=True)
    items = write(case)
    [path] = folder.glob(pattern)
    try:
        inputs = open_inputs([str(path)], kind)
        [(_, given)] = inputs
        units = list(given.units())
    except DataError:  # refused as a whole
        return
    accounts = Accounts()
    found: list[Draft | Rejected | NotRead] = []
    for unit in units:
        accounts.give(given.given(unit))
        for entry in given.read(unit):
            if not isinstance(entry, NotRead):
                accounts.give(entry.given)
            accounts.use(entry.items, fate_of(entry))
            found.append(entry)
    accounts.check(f"{maker} {seed}")
    for level, count in items.items():
        assert accounts.levels.get(level, Counter())["given"] == count, (level, accounts.as_json())
    names = Counter(name for entry in found for name in names_of(entry))
    rejections = " ".join(f"{entry.origin} {entry.detail}" for entry in found if isinstance(entry, Rejected))
    rejected = sum(isinstance(entry, Rejected) for entry in found)
    skipped = " ".join(skipped_files([str(path)], inputs))
    for name, count in case.added.items():
        known = sum(number for other, number in names.items() if name in other or other.startswith(WHOLE_ITEMS))
        assert known or name in rejections or name in skipped or rejected >= count, f"{name} vanished: {names}"


def fate_of(entry: Draft | Rejected | NotRead) -> str:
    return {Draft: "in_samples", Rejected: "rejected", NotRead: "not_read"}[type(entry)]


def names_of(entry: Draft | Rejected | NotRead) -> Iterator[str]:
    """Yield the names that an entry accounts for."""
    if isinstance(entry, NotRead):
        yield entry.name
    elif isinstance(entry, Draft):
        yield from (*entry.not_read, *entry.read_as, *entry.record, *unused_message_keys(entry.record), entry.origin)


@pytest.mark.parametrize("maker", MAKERS)
def test_mutated_inputs_lose_no_item_and_no_name(maker: str, tmp_path: Path) -> None:
    for seed in range(40):
        check(maker, seed, tmp_path / str(seed))


@pytest.mark.slow
@pytest.mark.parametrize("maker", MAKERS)
def test_2000_mutated_inputs_lose_no_item_and_no_name(maker: str, tmp_path: Path) -> None:
    for seed in range(1000, 3000):
        check(maker, seed, tmp_path / str(seed))
