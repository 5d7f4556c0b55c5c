"""How alike two sequences are, from 0 to 1: edit distance, common subsequence, pairs of letters.

Sequences are texts, or lists of tokens. The time is the product of both lengths divided by the bits of a word, so the
product is limited: an answer of a megabyte is still compared with a text of 40,000 letters.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from rapidfuzz.distance import LCSseq, Levenshtein

MAX_PRODUCT = 4 * 10**10  # below 2 seconds of one core


def comparable(a: Sequence[Hashable], b: Sequence[Hashable]) -> bool:
    """Return whether two sequences are short enough to be compared."""
    return len(a) * len(b) <= MAX_PRODUCT


def edit_similarity(a: Sequence[Hashable], b: Sequence[Hashable]) -> float:
    """Return 1 - edits / length of the longer; 1 for two empty sequences.

    >>> edit_similarity("Invoice2O41", "Invoice2041") == 1 - 1 / 11
    True
    """
    longer = max(len(a), len(b))
    return 1 - Levenshtein.distance(a, b) / longer if longer else 1.0


def common_subsequence(a: Sequence[Hashable], b: Sequence[Hashable]) -> float:
    """Return the length of the longest common subsequence / length of the longer; 1 for two empty sequences.

    >>> common_subsequence("wether", "weather") == 6 / 7
    True
    """
    longer = max(len(a), len(b))
    return LCSseq.similarity(a, b) / longer if longer else 1.0


def shared_bigrams(a: str, b: str) -> float:
    """Return the pairs of adjacent letters that both texts have / those that either has.

    >>> shared_bigrams("night", "nacht") == 1 / 7
    True
    """
    pairs_a, pairs_b = ({text[i : i + 2] for i in range(len(text) - 1)} for text in (a, b))
    either = pairs_a | pairs_b
    return len(pairs_a & pairs_b) / len(either) if either else float(a == b)
