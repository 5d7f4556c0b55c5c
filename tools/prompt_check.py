"""Check, when shards are built, that the answers to a prompt can be scored: data_pipeline knows no verifiers."""

from __future__ import annotations

from data_pipeline.domains.rl_record import RlRecord
from data_pipeline.errors import BadSample


def check_prompt(prompt: RlRecord) -> None:
    """Check that the verifier of a prompt exists, knows its settings and can read its reference.

    Raises:
        BadSample: unknown_verifier or bad_reference.
    """
    from rewards.table import verifier_named  # imports the libraries of all verifiers, which only prompts need
    from rewards.verdict import Item, RewardError

    try:
        verifier = verifier_named(prompt.verifier)
    except RewardError as error:
        raise BadSample("unknown_verifier", str(error)) from None
    try:
        verifier.check(Item(prompt.question, prompt.reference, prompt.settings))
    except RewardError as error:
        raise BadSample("bad_reference", str(error)) from None
