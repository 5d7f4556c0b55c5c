"""Prompts that are there twice: in the sources, which draws them twice as often, or in training and held out."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data_pipeline.shards.prompt_facts import earlier_rows
from rl.prompts import PromptTable


def warnings_of_repeated(table: PromptTable) -> Iterator[str]:
    """Yield a line if prompts ask the same, with the same images and videos, as others of the table."""
    asked, rules = table.contents.T
    first = earlier_rows(asked)
    again = np.flatnonzero(first != np.arange(len(asked)))
    if not len(again):
        return
    other_rules = int((rules[again] != rules[first[again]]).sum())
    scored = f" ({other_rules:,} of them with another reference, verifier or setting)" if other_rules else ""
    ids = table.facts.ids
    yield (
        f"{len(again):,} of {len(asked):,} prompts of data.sources ask the same as an earlier one{scored}, such as "
        f"{ids[again[0]]} and {ids[first[again[0]]]}: they are drawn as if they were others, so what they ask is drawn "
        "more often; build the sources without them"
    )


def warnings_of_held_out(held_out: PromptTable, training: PromptTable) -> Iterator[str]:
    """Yield a line if held-out prompts are also training prompts."""
    asked, learned = held_out.contents[:, 0], training.contents[:, 0]
    shared = np.flatnonzero(np.isin(asked, learned))
    if len(shared):
        same = int(np.argmax(learned == asked[shared[0]]))
        yield (
            f"{len(shared):,} of {len(asked):,} held-out prompts ask the same as training prompts, such as "
            f"{held_out.facts.ids[shared[0]]} and {training.facts.ids[same]}: validation then shows what was trained "
            "on; build one of the sources without them, or set validation.allow_overlap=true"
        )
