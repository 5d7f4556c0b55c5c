"""The record of the domain `rl`: a question for the model to answer, and how its answers are scored.

    {"domain": "rl", "messages": [{"role": "user", "content": "<image>How many dots?"}], "images": ["dots.png"],
     "reference": "7", "verifier": "counting"}

    messages, thinking, tools   the prompt: chat.render_prompt. `thinking` null or absent: the model thinks first
    reference                   what an answer is compared with
    verifier, settings          the rule by which it is compared (rewards/), and its settings; the setting `options`
                                lists the options of a multiple-choice question, which its text must have
    data_source, category       where it comes from and what it is about: prompts of a kind are drawn together
    tier                        how difficult people find it, one of TIERS

Whether the verifier exists and can read the reference is checked when shards are built (sharding/tasks.RecordCheck).
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from common.nearest import suggestion
from data_pipeline.domains.documents import split_placeholders
from data_pipeline.errors import BadSample
from data_pipeline.sample import Text

# From the most difficult to the easiest, as `curriculum.edges` orders pass rates.
TIERS = ("very_hard", "hard", "medium", "easy", "very_easy")
# Fields of a prompt beside those of a chat.
FIELDS = ("reference", "verifier", "settings", "data_source", "category", "tier")
# Fields of other tools (verl, GLM-V) for the reference of a prompt, beside `prompt` or `prompts`.
FOREIGN_REFERENCES = ("reward_model", "gt_answer", "gt_answers")
# What surrounds an answer in a response. A reference is the answer alone.
ANSWER_MARKS = ("<think>", "</think>", "<answer>", "</answer>", "<|begin_of_box|>", "<|end_of_box|>")


@dataclass(frozen=True)
class RlRecord:
    """What is known of a prompt beside its tokens."""

    question: str  # text of the last message, without images and videos
    reference: str
    verifier: str
    settings: Mapping[str, Any]
    source: str  # `data_source` of the record; empty: it names none
    category: str  # empty: none
    tier: str  # one of TIERS; empty: unknown
    thinks: bool  # whether the model is to think first


def read_rl_record(record: Mapping[str, Any]) -> RlRecord:
    """Return the fields of a record of the domain `rl`, whose messages are checked where they are rendered.

    Raises:
        BadSample: no_verifier, bad_reference, unknown_tier, options_not_asked or bad_record.
    """
    for name in ("data_source", "category"):
        if not isinstance(record.get(name) or "", str):
            raise BadSample("bad_record", f'"{name}" is {str(record[name])[:40]!r}: it must be a text')
    verifier, settings = record.get("verifier"), record.get("settings") or {}
    if not isinstance(verifier, str) or not verifier:
        raise BadSample("no_verifier", 'a record of domain "rl" needs "verifier", the name of a verifier')
    if not isinstance(settings, dict):
        raise BadSample("bad_record", f'"settings" is {str(settings)[:40]!r}: it must be an object')
    question = _question(record.get("messages"))
    _check_options(settings.get("options"), question)
    return RlRecord(
        question=question,
        reference=_reference(record.get("reference")),
        verifier=verifier,
        settings=settings,
        source=record.get("data_source") or "",
        category=record.get("category") or "",
        tier=_tier(record.get("tier")),
        thinks=record.get("thinking") is not False,
    )


def is_foreign_prompt(names: Container[str]) -> bool:
    """Return whether names of fields or columns are those of verl's or GLM-V's prompts, which a build converts."""
    return ("prompt" in names or "prompts" in names) and any(name in names for name in FOREIGN_REFERENCES)


def option_texts(options: Any) -> list[str]:
    """Return the texts of options: a list of texts, or an object {"A": text}.

    Raises:
        BadSample: bad_record.
    """
    texts = list(options.values()) if isinstance(options, dict) else options
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise BadSample("bad_record", '"options" must be a list of texts, or an object of them')
    return texts


def _reference(reference: Any) -> str:
    if not isinstance(reference, str):
        problem = "it has none" if reference is None else f"it is {str(reference)[:40]!r}"
        raise BadSample("bad_reference", f'a record of domain "rl" needs the text "reference": {problem}')
    if not reference.strip():
        raise BadSample("bad_reference", 'the text "reference" is empty: no answer would be right')
    if mark := next((mark for mark in ANSWER_MARKS if mark in reference), ""):
        raise BadSample("bad_reference", f'"reference" holds {mark}: write the answer alone')
    return reference


def _tier(tier: Any) -> str:
    if tier is None or tier == "":
        return ""
    if tier not in TIERS:
        hint = suggestion(tier, TIERS) if isinstance(tier, str) else ""
        raise BadSample("unknown_tier", f'"tier" is {str(tier)[:40]!r}{hint}: write one of {", ".join(TIERS)}')
    return tier


def _question(messages: Any) -> str:
    last = messages[-1] if isinstance(messages, list) and messages else None
    content = last.get("content") if isinstance(last, dict) else None
    if not isinstance(content, str):
        return ""  # rendering rejects it
    parts = split_placeholders(content, loss=False)
    return "".join(part.text for part in parts if isinstance(part, Text)).strip()


def _check_options(options: Any, question: str) -> None:
    if not options:
        return
    if missing := [text for text in option_texts(options) if text.strip() not in question]:
        raise BadSample(
            "options_not_asked", f"the option {missing[0][:40]!r} is not in the question: write the options there"
        )
