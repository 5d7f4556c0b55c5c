"""The newest rollouts of a run for its report: prompts with their images, and what each rollout answered."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from model.config import ConfigError

SHOWN_PROMPTS, SHOWN_ROLLOUTS, SHOWN_TEXT = 12, 8, 600  # of a page, of a prompt; characters of a thought or answer
THOUGHT = re.compile(r"\s*(?:<think>)?(.*?)</think>(.*)", re.DOTALL)


@dataclass(frozen=True)
class RolloutRow:
    """One rollout."""

    thought: str
    answer: str
    score: float
    reason: str


@dataclass(frozen=True)
class PromptRows:
    """The rollouts of one prompt."""

    prompt: str
    question: str
    reference: str
    verifier: str
    images: list[str]  # JPEG, base64
    rollouts: list[RolloutRow] = field(default_factory=list)


@dataclass(frozen=True)
class NewestRollouts:
    """Some of the rollouts of a run's newest iteration."""

    step: int
    groups: list[PromptRows]


def newest_rollouts(folder: Path, steps: int) -> NewestRollouts | None:
    """Return the first prompts of the newest iteration that a run has done; None where there is none.

    Args:
        folder: Of the run. Where the run has fallen back, there are files of iterations that are still to come.
        steps: Iterations done.

    Raises:
        ConfigError: The file of that iteration is damaged.
    """
    files = sorted(file for file in (folder / "rollouts").glob("step_*.jsonl") if file.stem <= f"step_{steps:07d}")
    if not files:
        return None
    try:
        with files[-1].open(encoding="utf-8") as text:  # str.splitlines also splits at U+2028, which responses may have
            lines = [json.loads(line) for line in text]
        groups = [_rows(list(group)) for _, group in groupby(lines, key=lambda line: line["prompt"])]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{files[-1]} is damaged ({type(error).__name__}: {error}): remove it, and the report shows the iteration "
            "before it"
        ) from None
    return NewestRollouts(int(files[-1].stem.removeprefix("step_")), groups[:SHOWN_PROMPTS])


def _rows(lines: list[dict[str, Any]]) -> PromptRows:
    first = lines[0]
    return PromptRows(
        prompt=first["prompt"],
        question=_shortened(first["question"]),
        reference=_shortened(first["reference"]),
        verifier=first["verifier"],
        images=first.get("images", []),
        rollouts=[_row(line) for line in lines[:SHOWN_ROLLOUTS]],
    )


def _row(line: dict[str, Any]) -> RolloutRow:
    found = THOUGHT.match(line["response"])
    thought, answer = found.groups() if found else ("", line["response"])
    reason = line["reason"] + (" (forced)" if line["forced"] else "")
    return RolloutRow(_shortened(thought), _shortened(answer), line["score"], reason)


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN_TEXT else f"{text[:SHOWN_TEXT]} ..."
