"""Every verifier, by name."""

from __future__ import annotations

from collections.abc import Mapping

from common.nearest import suggestion
from rewards.verdict import RewardError
from rewards.verifier import Verifier
from rewards.verifiers.exact import Exact

VERIFIERS: Mapping[str, Verifier] = {verifier.name: verifier for verifier in (Exact(),)}


def verifier_named(name: str) -> Verifier:
    """Return a verifier.

    Raises:
        RewardError: There is none of this name. The message has the nearest one.
    """
    if name not in VERIFIERS:
        hint = suggestion(name, VERIFIERS) or f": the verifiers are {', '.join(VERIFIERS)}"
        raise RewardError(f"there is no verifier {name!r}{hint}")
    return VERIFIERS[name]
