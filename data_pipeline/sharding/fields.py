"""The fields of records and messages that training reads, and those that nothing reads.

Other fields are stored as well, but counted: an unknown field may be a misspelled one.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from data_pipeline.domains.rl_record import FIELDS as FIELDS_OF_PROMPTS

# Fields that training reads, and fields that inputs write for people to read.
KNOWN_FIELDS = frozenset(
    (
        *("domain", "text", "messages", "thinking", "tools", "source", "original_text"),
        *("title", "pages", "page", "slides", "markup", "dropped_images", "start", "end"),
        *("font", "font_size", "line_boxes"),
    )
)
MESSAGE_FIELDS = frozenset(("role", "content", "reasoning_content", "loss", "tool_calls"))  # of a chat's messages


def unused_fields(record: dict[str, Any]) -> set[str]:
    """Return the fields of a record that nothing reads."""
    known_of_domain = FIELDS_OF_PROMPTS if record.get("domain") == "rl" else ()
    return record.keys() - KNOWN_FIELDS - set(known_of_domain)


def unused_message_keys(record: dict[str, Any]) -> Counter[str]:
    """Count the keys of a chat's messages that nothing reads: {"message key name": 2}."""
    messages = record.get("messages") if record.get("domain") in ("chat", "rl") else None
    return Counter(
        f"message key {key}"
        for message in (messages if isinstance(messages, list) else ())
        if isinstance(message, dict)
        for key in message.keys() - MESSAGE_FIELDS
    )
