"""A run that is killed and resumed draws what it would have drawn; a state that does not fit is refused."""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

import numpy as np
import pytest

from model.errors import CheckpointError
from rl.curriculum.config import CurriculumConfig
from rl.curriculum.curriculum import Curriculum
from rl.curriculum.facts import PromptFacts
from rl.expansion import Expansion, ExpansionConfig
from tests.rl.curriculum.prompts import make_facts

pytestmark = pytest.mark.fast

PROMPTS, GROUP, ITERATIONS = 16, 6, 25


def some_facts(**changed: Any) -> PromptFacts:
    rng = np.random.default_rng(0)
    rollouts = rng.choice([0.0, 8.0], 300)
    return make_facts(
        rng.integers(0, 5, 300),
        [0, 0, 1, 1, 2],
        rollouts=rollouts,
        passes=np.floor(rollouts * rng.random(300)),
        tiers=rng.integers(-1, 5, 300),
        **changed,
    )


class Run:
    """Draws, and answers that depend on seed, iteration and prompt alone, as rollouts with fixed seeds do."""

    def __init__(self) -> None:
        self.curriculum = Curriculum(CurriculumConfig(), some_facts(), seed=9)
        self.expansion = Expansion(ExpansionConfig())

    def step(self, iteration: int) -> list[int]:
        rows = self.curriculum.draw(iteration, self.expansion.count(PROMPTS))
        passes = np.array([np.random.default_rng([iteration, int(row)]).binomial(GROUP, row / 300) for row in rows])
        self.curriculum.observe(rows, passes, np.full(len(rows), GROUP))
        self.expansion.observe(float(((passes > 0) & (passes < GROUP)).mean()))
        return rows.tolist()

    def save(self) -> str:
        return json.dumps([self.curriculum.state_dict(), self.expansion.state_dict()])

    @staticmethod
    def resumed(saved: str) -> Run:
        run = Run()
        curriculum, expansion = json.loads(saved)
        run.curriculum.load_state_dict(curriculum)
        run.expansion.load_state_dict(expansion)
        return run


def test_run_that_is_killed_after_any_iteration_draws_the_same_afterwards() -> None:
    whole = Run()
    saves, draws = [whole.save()], []
    for iteration in range(ITERATIONS):
        draws.append(whole.step(iteration))
        saves.append(whole.save())
    for killed in range(ITERATIONS):
        run = Run.resumed(saves[killed])
        assert run.save() == saves[killed]
        assert [run.step(iteration) for iteration in range(killed, ITERATIONS)] == draws[killed:]
        assert run.curriculum.rates.tobytes() == whole.curriculum.rates.tobytes()
        assert run.save() == saves[-1]


def test_state_that_is_loaded_replaces_what_was_observed() -> None:
    run, fresh = Run(), Run()
    run.step(0)
    run.curriculum.load_state_dict(fresh.curriculum.state_dict())
    assert run.curriculum.rates.tobytes() == fresh.curriculum.rates.tobytes()


@pytest.mark.parametrize(
    "changed",
    [
        {"ids": [f"b.tar/{row}" for row in range(300)]},
        {"source_weights": [1.0, 1.0, 1.0, 1.0], "kind_names": list("abcde")},
    ],
)
def test_state_of_other_prompts_is_refused(changed: dict[str, Any]) -> None:
    saved = Run()
    saved.step(0)
    other = Curriculum(CurriculumConfig(), some_facts(**changed), seed=9)
    before = other.state_dict()
    with pytest.raises(CheckpointError, match=r"belongs to other prompts.*model\.init_from"):
        other.load_state_dict(saved.curriculum.state_dict())
    assert other.state_dict() == before


def test_weights_of_sources_and_keys_may_change() -> None:
    saved = Run()
    saved.step(0)
    config = CurriculumConfig(kind_floor=1.0, weights=[0.1, 1.0, 1.0, 1.0, 0.1])
    other = Curriculum(config, some_facts(source_weights=[5.0, 1.0, 1.0]), seed=9)
    other.load_state_dict(saved.curriculum.state_dict())
    assert other.rates.tolist() == saved.curriculum.rates.tolist()


def packed(values: Any, dtype: str) -> str:
    return base64.b64encode(zlib.compress(np.asarray(values, dtype).tobytes())).decode()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rows", None),
        ("rows", 5),
        ("rows", "not base64!"),
        ("rows", base64.b64encode(b"not zlib").decode()),
        ("rows", base64.b64encode(zlib.compress(bytes(400))[:-6]).decode()),
        ("rows", base64.b64encode(zlib.compress(bytes(3))).decode()),
        ("rows", base64.b64encode(zlib.compress(bytes(10**7))).decode()),
        ("rows", packed([3, 3], "<u4")),
        ("rows", packed([5, 3], "<u4")),
        ("rows", packed([0, 300], "<u4")),
        ("rows", packed([0], "<u4")),
        ("passes", packed([], "<f8")),
        ("passes", packed([np.nan] * PROMPTS, "<f8")),
        ("passes", packed([1e9] * PROMPTS, "<f8")),
        ("rollouts", packed([-1.0] * PROMPTS, "<f8")),
        ("rollouts", packed([np.inf] * PROMPTS, "<f8")),
        ("kind_passes", packed([0.0] * 4, "<f8")),
        ("kind_rollouts", packed([0.0] * 5, "<f8")),
    ],
)
def test_damaged_state_is_refused_and_nothing_changes(name: str, value: Any) -> None:
    saved = Run()
    saved.step(0)
    state = saved.curriculum.state_dict()
    if value is None:
        del state[name]
    else:
        state[name] = value
    run = Run()
    before = run.curriculum.state_dict()
    with pytest.raises(CheckpointError, match=r"curriculum in the checkpoint is damaged \(\w+\); use another step"):
        run.curriculum.load_state_dict(state)
    assert run.curriculum.state_dict() == before


@pytest.mark.parametrize("cut", [1, 4, 6])
def test_state_that_is_cut_off_is_refused(cut: int) -> None:
    """The last bytes are a checksum: without them the numbers are all there, and perhaps wrong."""
    saved = Run()
    saved.step(0)
    state = saved.curriculum.state_dict()
    state["passes"] = base64.b64encode(base64.b64decode(state["passes"])[:-cut]).decode()
    with pytest.raises(CheckpointError, match=r"damaged \(passes\)"):
        Run().curriculum.load_state_dict(state)


def test_state_of_a_million_prompts_is_small() -> None:
    count = 1_000_000
    facts = make_facts(np.arange(count) % 7)
    rng = np.random.default_rng(0)
    curriculum = Curriculum(CurriculumConfig(), facts, seed=0)
    assert len(json.dumps(curriculum.state_dict())) < 1000
    for _ in range(2):
        curriculum.observe(np.arange(count), rng.binomial(8, rng.random(count)), np.full(count, 8))
    saved = json.dumps(curriculum.state_dict())
    assert len(saved) < 10e6
    other = Curriculum(CurriculumConfig(), facts, seed=0)
    other.load_state_dict(json.loads(saved))
    assert other.draw(5, 1000).tolist() == curriculum.draw(5, 1000).tolist()


def test_report_counts_the_last_draw() -> None:
    run = Run()
    fresh = run.curriculum.report()
    assert fresh["curriculum/seen"] == 0
    assert sum(fresh[f"curriculum/drawn/tier_{tier}"] for tier in range(5)) == 0
    tiers = run.curriculum.tiers
    rows = np.array(run.step(0))
    kinds = some_facts().kinds
    report = run.curriculum.report()
    assert report["curriculum/seen"] == len(rows) / 300
    for tier in range(5):
        assert report[f"curriculum/drawn/tier_{tier}"] == pytest.approx((tiers[rows] == tier).mean())
        assert report[f"curriculum/prompts/tier_{tier}"] == pytest.approx((run.curriculum.tiers == tier).mean())
    for kind, name in enumerate(some_facts().kind_names):
        assert report[f"curriculum/drawn/{name}"] == pytest.approx((kinds[rows] == kind).mean())
        assert report[f"curriculum/pass_rate/{name}"] == run.curriculum.kind_rates[kind]
    assert sum(report[f"curriculum/weight/tier_{tier}"] for tier in range(5)) == pytest.approx(1)
    assert all(type(value) is float for value in report.values())
