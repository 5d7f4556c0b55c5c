"""Sets of questions and answers about images, converted to conversations.

    The Cauldron, FineVision, Docmatix   {"images": [...], "texts": [{"user": "Who?", "assistant": "Me."}]}
    visual question answering            {"image": ..., "question": "Who?", "answer": "Me."}

Both become {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]}, which
chat_formats.py completes. Keys beside the question and the answer stay in the answer's message.
"""

from __future__ import annotations

from typing import Any

from data_pipeline.errors import BadSample

QUESTION_COLUMNS = frozenset(("question", "answer"))


def is_question_set(record: dict[str, Any]) -> bool:
    """Return whether a record is a set of questions that `as_conversation` must convert."""
    if record.get("domain", "chat") != "chat" or "messages" in record or "conversations" in record:
        return False
    return _is_list_of_pairs(record) or (
        record.keys() >= QUESTION_COLUMNS and not {"text", "instruction"} & record.keys()
    )


def as_conversation(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record with `messages` in place of its questions and answers, and without a domain.

    Raises:
        BadSample: bad_record.
    """
    if _is_list_of_pairs(record):
        pairs, used = record["texts"], {"texts"}
        question, answer = "user", "assistant"
    else:
        used = set(QUESTION_COLUMNS)
        question, answer = "question", "answer"
        pairs = [{key: record[key] for key in used}]
    messages: list[dict[str, Any]] = []
    for number, pair in enumerate(pairs):
        asked, answered = pair.get(question), _single(pair.get(answer))
        if not isinstance(asked, str) or not isinstance(answered, str):
            raise BadSample(
                "bad_record", f'pair {number}: "{question}" and "{answer}" must be texts, or a list of one answer'
            )
        rest = {key: value for key, value in pair.items() if key not in (question, answer) and value is not None}
        messages.append({"role": "user", "content": asked})
        messages.append({**rest, "role": "assistant", "content": answered})
    return {"messages": messages, **{key: value for key, value in record.items() if key not in used | {"domain"}}}


def _is_list_of_pairs(record: dict[str, Any]) -> bool:
    texts = record.get("texts")
    return isinstance(texts, list) and bool(texts) and all(isinstance(pair, dict) for pair in texts)


def _single(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(value) == 1 else value
