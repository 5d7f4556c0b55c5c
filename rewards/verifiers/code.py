"""code: how much of a program, a page or a drawing is as the reference has it. Nothing is run.

The tokens of both (`rewards.source_code`) are compared: 1 if they are the same, else common subsequence / length of the
longer. Code that does not parse in its `language` scores 0. Markdown's fences around the code do not count.

With `partial: false`, only the same tokens score, 1, and all else 0.

Reasons: equal, unparsed, tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from common.nearest import suggestion
from rewards.similarity import common_subsequence
from rewards.source_code import LANGUAGES, MAX_CHARACTERS, MAX_TOKENS, tokens, without_fence
from rewards.verdict import Item, Outcome, RewardError, Verdict
from rewards.verifier import check_settings, setting


class Code:
    """Source code, by its structure."""

    name = "code"
    settings: Mapping[str, Any] = {"language": "python", "partial": True}

    def check(self, item: Item) -> None:
        check_settings(self, item)
        language = setting(self, item, "language")
        if not _tokens(item.reference, language):
            raise RewardError(
                f"code: the reference is empty, is no {language}, or has more than {MAX_CHARACTERS:,} characters or "
                f"{MAX_TOKENS:,} tokens"
            )

    def check_values(self, item: Item) -> None:
        if (language := setting(self, item, "language")) not in LANGUAGES:
            hint = suggestion(language, LANGUAGES) or f": the languages are {', '.join(LANGUAGES)}"
            raise RewardError(f"code: there is no language {language!r}{hint}")

    def score(self, answer: str, item: Item) -> Outcome:
        language = setting(self, item, "language")
        given = _tokens(answer, language)
        if given is None:
            return Verdict(0.0, "unparsed")
        wanted = _reference(item.reference, language)
        if given == wanted:
            return Verdict(1.0, "equal")
        return Verdict(common_subsequence(given, wanted or []) if setting(self, item, "partial") else 0.0, "tokens")


@lru_cache(maxsize=256)
def _reference(code: str, language: str) -> list[str] | None:
    """Return the tokens of a reference, which many answers are compared with."""
    return _tokens(code, language)


def _tokens(code: str, language: str) -> list[str] | None:
    return tokens(without_fence(code), language)
