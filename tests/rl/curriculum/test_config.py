"""Wrong keys of the curriculum, and grades and labels that cannot be true, are each one message that names them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import DataError
from model.errors import ConfigError
from rl.curriculum.config import CurriculumConfig
from rl.curriculum.facts import PromptFacts
from tests.rl.curriculum.prompts import make_facts

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sampler": "greedy"}, r"curriculum\.sampler='greedy': choose one of rlcs, uniform"),
        ({"edges": [0.3, 0.3, 0.7, 0.9]}, r"curriculum\.edges=.*each above the one before"),
        ({"edges": [0.7, 0.3, 0.8, 0.9]}, r"curriculum\.edges=.*each above the one before"),
        ({"edges": [], "weights": [1.0]}, r"curriculum\.edges=\[\]: give at least one"),
        ({"edges": [0.0, 0.3, 0.7, 0.9]}, r"curriculum\.edges=.*above 0 and below 1"),
        ({"edges": [0.1, 0.3, 0.7, 1.0]}, r"curriculum\.edges=.*above 0 and below 1"),
        ({"edges": [0.1, float("nan"), 0.7, 0.9]}, r"curriculum\.edges=.*above 0 and below 1"),
        ({"weights": [1.0, 1.0]}, r"curriculum\.weights has 2 numbers.*make 5 tiers"),
        ({"weights": [0.0, 1.0, 1.0, 1.0, 1.0]}, r"curriculum\.weights=.*a positive number"),
        ({"weights": [float("inf"), 1.0, 1.0, 1.0, 1.0]}, r"curriculum\.weights=.*a positive number"),
        ({"weights": [1e-9, 1.0, 1.0, 1.0, 1.0]}, r"curriculum\.weights=.*1,000,000 times another"),
        ({"kind_floor": 0.0}, r"curriculum\.kind_floor=0\.0: give a number from 0\.001 to 1"),
        ({"fade": 1.5}, r"curriculum\.fade=1\.5: give a number from 0 to 1"),
        ({"kind_fade": -0.1}, r"curriculum\.kind_fade=-0\.1"),
        ({"prior_rollouts": 0.0}, r"curriculum\.prior_rollouts=0\.0: give a positive number"),
        ({"label_rollouts": -1.0}, r"curriculum\.label_rollouts=-1\.0"),
        ({"pass_score": 0.0}, r"curriculum\.pass_score=0\.0"),
        ({"pass_score": float("nan")}, r"curriculum\.pass_score=nan"),
    ],
)
def test_wrong_keys_are_named(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CurriculumConfig(**keys)


def test_any_number_of_tiers_is_accepted() -> None:
    assert CurriculumConfig(edges=[0.5], weights=[1.0, 2.0]).edges == [0.5]


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (make_facts([], [0]), "there are no prompts: data.sources"),
        (
            make_facts([0, 0], passes=np.array([0.0, 3.0]), rollouts=np.array([0.0, 2.0])),
            "a.tar/000001 is 3 passes of 2",
        ),
        (make_facts([0], passes=np.array([np.nan]), rollouts=np.array([2.0])), "a.tar/000000 is nan passes of 2"),
        (make_facts([0, 0], tiers=np.array([4, 5])), r"a.tar/000001 is labelled tier 5.*5 tiers, 0 \(hardest\) to 4"),
        (make_facts([0], tiers=np.array([-2])), "a.tar/000000 is labelled tier -2"),
    ],
)
def test_wrong_prompts_are_named(facts: PromptFacts, message: str) -> None:
    with pytest.raises(DataError, match=message):
        facts.check(tiers=5)


def test_fingerprint_changes_with_everything_but_the_weights_of_sources() -> None:
    facts = make_facts([0, 1], [0, 1])
    same = make_facts([0, 1], [0, 1], source_weights=[1.0, 5.0])
    others = [
        make_facts([1, 0], [0, 1]),
        make_facts([0, 1], [0, 1], ids=["a", "b"]),
        make_facts([0, 1], [0, 1], tiers=np.array([-1, 0])),
        make_facts([0, 1], [0, 1], rollouts=np.array([0.0, 1.0])),
        make_facts([0, 1], [0, 1], kind_names=["x", "y"]),
    ]
    assert same.fingerprint() == facts.fingerprint()
    assert facts.fingerprint() not in {other.fingerprint() for other in others}
