"""The thought before an assistant's answer: in `reasoning_content`, or as <think>...</think> before the answer.

The tags become special tokens, so an answer whose tags do not pair is never learned. Text that would be in neither the
thought nor the answer is never dropped: such a message is rejected.
"""

from __future__ import annotations

from typing import Any

from data_pipeline.errors import BadSample

_OPEN, _CLOSE = "<think>", "</think>"
_ANSWER_TAGS = (("<answer>", "</answer>"), ("<|begin_of_box|>", "<|end_of_box|>"))


def split_reasoning(turn: dict[str, Any]) -> tuple[str, str]:
    """Return (reasoning, answer) of an assistant's turn.

    Raises:
        BadSample: As `check_tags`.
    """
    check_tags(turn)
    content, reasoning = turn["content"], (turn.get("reasoning_content") or "").strip()
    if reasoning:
        return reasoning, content.strip()
    if _CLOSE not in content:
        return "", content.strip()
    head, tail = content.split(_CLOSE)
    return head.split(_OPEN)[-1].strip(), tail.strip()


def check_tags(turn: dict[str, Any]) -> None:
    """Check the tags of an assistant's turn.

    A </think> without <think> ends a thought that begins with the content: some models are prompted with <think>.

    Raises:
        BadSample: `unclosed_thought`; `misplaced_thought`, if there is more than one thought or text before it;
            `unclosed_answer`.
    """
    content, reasoning = turn["content"], turn.get("reasoning_content") or ""
    before, opened, after = content.partition(_OPEN)
    if opened and _CLOSE not in after:
        raise BadSample("unclosed_thought", "an assistant's turn has <think> without </think>: it seems to be cut off")
    if opened and before.strip():
        raise BadSample("misplaced_thought", "an assistant's turn has text before <think>")
    thoughts = content.count(_CLOSE) + bool(reasoning.strip())
    if thoughts > 1 or content.count(_OPEN) > 1 or _OPEN in reasoning or _CLOSE in reasoning:
        raise BadSample("misplaced_thought", "an assistant's turn has two thoughts, or tags inside its thought")
    for opening, closing in _ANSWER_TAGS:
        if content.count(opening) > content.count(closing):
            raise BadSample("unclosed_answer", f"an assistant's turn has {opening} without {closing}")
