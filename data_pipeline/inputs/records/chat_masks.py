"""Marks of other tools that say which answers to learn, and data to choose from rather than to learn.

    ms-swift           {"role": "assistant", "content": "...", "loss": false}
    LLaMA-Factory v1   {"role": "assistant", "content": [...], "loss_weight": 0.0}
    axolotl            {"from": "gpt", "value": "...", "train": false}        or "training"
    OpenAI, Mistral    {"role": "assistant", "content": "...", "weight": 0}
    others             {"role": "assistant", "content": "...", "mask": 1}

Each becomes "loss": false. A record may also hold one mark per message, or one per answer, in a list. A weight between
0 and 1 cannot be obeyed: an answer is learned or not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from data_pipeline.domains.chat import LEARNED_MARKS, MASKED_MARKS
from data_pipeline.errors import BadSample

# Key of a message, or of a list in the record -> whether 1 or true means that an answer is learned.
_MARKS = {
    **dict.fromkeys(("loss", *LEARNED_MARKS), True),
    **dict.fromkeys(MASKED_MARKS, False),
}
MARKS = frozenset(_MARKS)
_LISTS = {**_MARKS, "losses": True, "loss_weights": True, "weights": True, "loss_masks": True, "masks": False}
_WEIGHTS = ("loss_weight", "sample_weight")  # of a whole record
_DETAILS = ("train_detail", "training_detail", "train_details")  # axolotl: parts of an answer
_FOREIGN = MARKS - {"loss"} | {*_DETAILS}
KTO_TAGS = ("label", "kto_tag")  # fields of a chat that say whether a judge liked its answer
# Fields of a record that holds a better and a worse answer.
_PREFERENCE = {
    *("rejected", "rejected_response", "rejected_messages", "rejected_answer", "rejected_output"),
    *("chosen_messages", "chosen_response", "preferred_output", "non_preferred_output"),
}
_WORDS = {"true": 1, "false": 0, "yes": 1, "no": 0, "1": 1, "0": 0, "1.0": 1, "0.0": 0}


def check_preference(record: dict[str, Any]) -> None:
    """Check that a record is not about which answer is better.

    Raises:
        BadSample: preference_pair, or preference_data for an answer that a judge did not like (KTO).
    """
    for key in sorted(record.keys() & _PREFERENCE):
        if record[key] and isinstance(record[key], str | list | dict):
            raise BadSample(
                "preference_pair", f'"{key}": a pair of answers to choose from is not a conversation to learn'
            )
    tag = record.get("kto_tag")
    if record.get("label") is False or (tag is not None and _WORDS.get(str(tag).lower()) == 0):
        key = "label" if record.get("label") is False else "kto_tag"
        raise BadSample("preference_data", f'"{key}" says that this answer is not to be learned')


def is_preference(record: dict[str, Any]) -> bool:
    """Return whether `check_preference` would reject a record."""
    try:
        check_preference(record)
    except BadSample:
        return True
    return False


def has_foreign_mark(turn: dict[str, Any]) -> bool:
    """Return whether a message has a mark other than the own "loss": true or false."""
    return not _FOREIGN.isdisjoint(turn) or not isinstance(turn.get("loss", True), bool)


def has_record_mark(record: dict[str, Any]) -> bool:
    """Return whether a record has marks for its messages, or for all of them."""
    found = record.keys() & (*_LISTS, *_WEIGHTS)
    return any(
        isinstance(record[key], int | float | str)
        if key in _WEIGHTS and not isinstance(record[key], list)
        else isinstance(record[key], bool) or _is_list_of_marks(record[key])
        for key in found
    )


def is_learned(where: str, turn: dict[str, Any]) -> bool | None:
    """Return what the marks of a message say; None if it has none.

    Raises:
        BadSample: unsupported_weight, if this cannot be obeyed.
    """
    if "loss" not in turn and _FOREIGN.isdisjoint(turn):
        return None
    for key in _DETAILS:
        if turn.get(key):
            raise BadSample("unsupported_weight", f'{where}: "{key}" masks parts of an answer, which is not supported')
    given = {key: _verdict(where, key, turn[key], meaning) for key, meaning in _MARKS.items() if key in turn}
    verdicts = {verdict for verdict in given.values() if verdict is not None}
    if len(verdicts) > 1:
        raise BadSample("unsupported_weight", f"{where}: {', '.join(given)} contradict each other")
    return next(iter(verdicts), None)


def marks_of_record(record: dict[str, Any], roles: Sequence[str]) -> tuple[dict[int, bool], set[str]]:
    """Return what marks of the record say of its messages, by their numbers, and the names of these fields.

    Args:
        record: The record.
        roles: The role of each message.

    Raises:
        BadSample: unsupported_weight, or nothing_to_learn if nothing of the record is to be learned.
    """
    learned: dict[int, bool] = {}
    used: set[str] = set()
    for key in _WEIGHTS:
        if isinstance(record.get(key), int | float | str) and not _verdict("the record", key, record[key], True):
            raise BadSample("nothing_to_learn", f'the record has "{key}": {str(record[key])[:40]}')
    if _LISTS.keys().isdisjoint(record):
        return learned, used
    answers = [number for number, role in enumerate(roles) if role == "assistant"]
    for key, meaning in _LISTS.items():
        value = record.get(key)
        if isinstance(value, bool) and value is not meaning:
            raise BadSample("nothing_to_learn", f'the record has "{key}": {str(value).lower()}')
        if not isinstance(value, list) or not _is_list_of_marks(value):
            continue
        numbers = {len(answers): answers, len(roles): range(len(roles))}.get(len(value))
        if numbers is None:
            problem = f'"{key}" has {len(value)} values for {len(roles)} messages with {len(answers)} answers'
            raise BadSample("unsupported_weight", problem)
        used.add(key)
        for number, entry in zip(numbers, value, strict=True):
            verdict = _verdict(f"message {number}", key, entry, meaning)
            if verdict is not None:
                learned[number] = learned.get(number, True) and verdict
    return learned, used


def mark(message: dict[str, Any], verdict: bool | None, notes: Counter[str]) -> None:
    """Write in a message of a `chat` record whether it is learned. Only answers can be."""
    if verdict is False and message["role"] == "assistant":
        message["loss"] = False
    elif verdict is True and message["role"] != "assistant":
        notes[f"loss of a message of the {message['role']}"] += 1


def _is_list_of_marks(value: Any) -> bool:
    """Return whether a value can be a list of marks. Masks of images are lists of other things."""
    marks = value if isinstance(value, list) else []
    return bool(marks) and all(mark is None or isinstance(mark, int | float | str) for mark in marks)


def _verdict(where: str, key: str, value: Any, meaning: bool) -> bool | None:
    if value is None:
        return None
    number = _WORDS.get(value.strip().lower()) if isinstance(value, str) else value
    if not isinstance(number, int | float) or number not in (0, 1):
        problem = f'{where}: "{key}" is {str(value)[:40]!r}; an answer is learned (1) or not (0)'
        raise BadSample("unsupported_weight", problem)
    return bool(number) is meaning
