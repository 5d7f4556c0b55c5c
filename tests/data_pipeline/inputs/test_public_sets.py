"""The table of public data sets in docs/inputs.md: each command reads tiny files of the set's layout."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from data_pipeline.inputs.draft import Draft
from data_pipeline.inputs.kinds import open_inputs
from tests.data_pipeline.inputs.public_sets import SETS, Expected, PublicSet
from tests.data_pipeline.inputs.reading import read

PAGE = Path(__file__).parents[3] / "docs/inputs.md"
ROW = re.compile(r"^\| ([^|]+) \| `--input ([^`]+)` \|", re.MULTILINE)
COMMANDS = {name.strip(): arguments for name, arguments in ROW.findall(PAGE.read_text(encoding="utf-8"))}


def test_page_lists_these_sets() -> None:
    assert sorted(COMMANDS) == sorted(each.name for each in SETS)


@pytest.mark.parametrize("given", SETS, ids=[each.name for each in SETS])
def test_command_of_the_page_reads_the_set(given: PublicSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    path, kind, settings = arguments_of(COMMANDS[given.name])
    [(_, opened)] = open_inputs([path], kind, settings)
    drafts, rejected = read(opened)
    assert not rejected
    assert [sample_of(draft) for draft in drafts] == list(given.samples)


def arguments_of(command: str) -> tuple[str, str, list[str]]:
    """Return path, kind and settings of `PATH --kind KIND --set OPTION=VALUE ...`."""
    path, *options = shlex.split(command)
    given = list(zip(options[::2], options[1::2], strict=True))
    settings = [value for name, value in given if name == "--set"]
    return path, next((value for name, value in given if name == "--kind"), ""), settings


def sample_of(draft: Draft) -> Expected:
    record = draft.record
    text = record["text"] if "text" in record else " | ".join(turn["content"] for turn in record["messages"])
    return record["domain"], text, len(draft.images), len(draft.videos)
