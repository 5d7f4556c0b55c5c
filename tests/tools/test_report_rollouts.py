"""The rollouts that a run's page shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model.config import ConfigError
from tools.report_rollouts import newest_rollouts

pytestmark = pytest.mark.fast


def line(prompt: str, response: str, **changed: Any) -> str:
    content = {
        "prompt": prompt,
        "question": "Which  digit?",
        "reference": "7",
        "verifier": "vqa",
        "response": response,
        "score": 1.0,
        "reason": "equal",
        "forced": False,
        **changed,
    }
    return json.dumps(content) + "\n"


def test_newest_iteration_that_is_done_is_shown(tmp_path: Path) -> None:
    """The file of iteration 3 is from before the run fell back to 2."""
    assert newest_rollouts(tmp_path, 2) is None
    (tmp_path / "rollouts").mkdir()
    for step in (1, 2, 3):
        lines = [
            line(f"a.tar/{step}", "<think>Round.</think>It is 7.", images=["ab"]),
            line(f"a.tar/{step}", "7", forced=True),
            line("a.tar/other", "<think>Hm"),
        ]
        (tmp_path / "rollouts" / f"step_{step:07d}.jsonl").write_text("".join(lines))
    shown = newest_rollouts(tmp_path, 2)
    assert shown is not None
    assert shown.step == 2
    assert [(group.prompt, group.question, group.images) for group in shown.groups] == [
        ("a.tar/2", "Which digit?", ["ab"]),
        ("a.tar/other", "Which digit?", []),
    ]
    rows = [(row.thought, row.answer, row.reason) for row in shown.groups[0].rollouts]
    assert rows == [("Round.", "It is 7.", "equal"), ("", "7", "equal (forced)")]
    assert newest_rollouts(tmp_path, 0) is None


def test_response_may_have_any_separator_of_lines(tmp_path: Path) -> None:
    """As a run writes it: characters are not escaped, but for those below U+0020."""
    response = "1\u2028 2\u2029 3\x85 4\x0c 5\r 6\n 7"
    (tmp_path / "rollouts").mkdir()
    content = json.dumps(json.loads(line("a.tar/1", response)), ensure_ascii=False)
    (tmp_path / "rollouts" / "step_0000001.jsonl").write_text(f"{content}\n{content}\n", encoding="utf-8")
    shown = newest_rollouts(tmp_path, 1)
    assert shown is not None
    assert [row.answer.split() for row in shown.groups[0].rollouts] == [["1", "2", "3", "4", "5", "6", "7"]] * 2


@pytest.mark.parametrize("damaged", ['{"prompt": "a', "{}", "[1]", "3"])
def test_damaged_file_is_named(damaged: str, tmp_path: Path) -> None:
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "step_0000001.jsonl").write_text(line("a.tar/1", "7") + damaged)
    with pytest.raises(ConfigError, match=r"step_0000001.jsonl is damaged .* remove it"):
        newest_rollouts(tmp_path, 1)
