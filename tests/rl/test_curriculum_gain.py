"""What curriculum sampling is for: a simulated learner needs fewer rollouts than with uniform draws."""

from __future__ import annotations

import pytest

from benchmarks.curriculum import PROMPTS, rollouts_to_target, simulate


@pytest.mark.parametrize(("spread", "most"), [(4.0, 0.75), (8.0, 0.55)])
def test_learner_needs_fewer_rollouts(spread: float, most: float) -> None:
    """Medians of five seeds; the wider the spread of difficulties, the more of uniform draws teach nothing."""
    uniform = rollouts_to_target("uniform", spread)
    assert rollouts_to_target("RLCS", spread) <= most * uniform
    assert rollouts_to_target("RLCS with expansion", spread) <= most * uniform


@pytest.mark.parametrize(
    ("where", "least", "most"), [("among the others", 0, 0.8), ("own category", 0, 0.6), ("own source", 0.8, 1)]
)
def test_learner_of_whose_prompts_half_cannot_be_answered(where: str, least: float, most: float) -> None:
    """A source keeps its share of the prompts, whatever they are: only its own prompts are chosen among."""
    uniform, rlcs = (rollouts_to_target(way, 2.0, 2000, where) for way in ("uniform", "RLCS"))
    assert least * uniform <= rlcs <= most * uniform


def test_expansion_fills_the_batch_and_needs_fewer_iterations() -> None:
    plain, expanded = simulate("RLCS", 8.0, 0), simulate("RLCS with expansion", 8.0, 0)
    assert len(expanded.kept) <= 0.75 * len(plain.kept)
    assert sum(expanded.kept[20:]) >= 0.95 * PROMPTS * len(expanded.kept[20:])
