"""A registry, its judges and the prompts' verifiers: what contradicts is refused, what has no effect is named."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import cast

import pytest
import yaml

from data_pipeline.domains.rl_record import RlRecord
from model.config import ConfigError
from rewards.judge import JudgeConfig
from rewards.registry import parse_registry
from rewards.verdict import Verdict
from rl.errors import RolloutError
from rl.iteration import check_answers
from rl.reward_checks import changes_of_registry, check_rewards, warnings_of_rewards
from rl.reward_config import RewardConfig
from rl.rollout_manager import Group
from rl.rollouts import RolloutPrompt
from rl.scoring import ResponseToScore, Scorer
from tests.rewards.test_judge import Running

pytestmark = pytest.mark.fast
JUDGES = "judges: {small: {url: 'http://localhost:1/v1', model: m}}"


def checked(folder: Path, content: str, scored: dict[tuple[str, str], int]) -> list[str]:
    """Return the warnings about a registry."""
    (folder / "rewards.yaml").write_text(content)
    config = RewardConfig(registry=str(folder / "rewards.yaml"))
    counted = Counter(scored)
    return list(warnings_of_rewards(config, check_rewards(config, counted), counted, "glm45v", 0.75))


@pytest.mark.parametrize(
    ("content", "scored", "message"),
    [
        ("sources: {a: {verifier: grounding, settings: {iou: 0.7}}}", {("a", "vqa"): 3}, "vqa has no setting 'iou'"),
        ("sources: {a: {verifiable: false}}", {("a", "vqa"): 3}, "3 prompts of source 'a' .* a judge alone"),
        ("sources: {b: {verifier: vqa}}", {("a", "geoguess"): 2}, "2 prompts of source 'a' .verifier geoguess"),
        ("", {("a", "vqa"): 1}, "it has neither sources nor judges"),
    ],
)
def test_registry_that_cannot_score_the_prompts_is_refused(tmp_path: Path, content, scored, message) -> None:
    with pytest.raises(ConfigError, match=message):
        checked(tmp_path, content, scored)


def test_settings_are_for_every_verifier_that_the_prompts_name(tmp_path: Path) -> None:
    content = "sources: {a: {verifier: math, settings: {tolerance: 0.1}}}"
    assert not checked(tmp_path, content, {("a", "math"): 3})
    [warning] = checked(tmp_path, content, {("a", "math"): 3, ("a", "chart"): 2})
    assert warning == (
        "reward.registry: source 'a' has the verifier math, but 2 of its prompts name chart, which goes before"
    )


def test_what_a_registry_says_without_effect_is_named(tmp_path: Path) -> None:
    content = f"sources: {{a: {{verifier: vqa, form: glm41v, thinking: false}}, b: {{verifier: vqa}}}}\n{JUDGES}"
    warnings = checked(tmp_path, content, {("a", "vqa"): 3})
    assert [warning.split(": ", 1)[-1][:40] for warning in warnings] == [
        "b",
        "small",
        "form glm41v of source 'a' has no effect,",
        "thinking: false of source 'a' has no eff",
    ]
    used = f"sources: {{a: {{verifier: vqa, form: glm45v, judge: small}}}}\n{JUDGES}"
    assert not checked(tmp_path, used, {("a", "vqa"): 3})


def test_settings_of_what_no_rule_scores_are_named(tmp_path: Path) -> None:
    content = f"sources: {{a: {{verifiable: false, judge: small, settings: {{tolerance: 0.1}}}}}}\n{JUDGES}"
    [warning] = checked(tmp_path, content, {("a", "vqa"): 3})
    assert warning == "reward.registry: settings of source 'a' have no effect, because verifiable is false"


def test_judge_alone_scores_what_no_rule_can(tmp_path: Path) -> None:
    content = f"sources: {{a: {{verifiable: false, judge: small}}}}\n{JUDGES}"
    assert not checked(tmp_path, content, {("a", "vqa"): 3})


def test_registry_that_was_changed_since_the_checkpoint_is_named() -> None:
    before = "sources: {a: {verifier: math, settings: {tolerance: 0.1}}, b: {verifier: vqa}}\n" + JUDGES
    now = "sources: {a: {verifier: chart, settings: {ordered: true}}, c: {verifier: vqa}}\n" + JUDGES
    old, new = (asdict(parse_registry(yaml.safe_load(text))) for text in (before, now))
    assert not list(changes_of_registry(json.loads(json.dumps(old)), old))
    assert list(changes_of_registry(json.loads(json.dumps(old)), new)) == [
        "reward.registry: sources.a.settings.ordered was None in the checkpoint and is True now",
        "reward.registry: sources.a.settings.tolerance was 0.1 in the checkpoint and is None now",
        "reward.registry: sources.a.verifier was 'math' in the checkpoint and is 'chart' now",
        "reward.registry: sources.b is gone since the checkpoint",
        "reward.registry: sources.c is new since the checkpoint",
    ]


def group_of(*reasons: str) -> Group:
    return Group(0, cast(RolloutPrompt, None), cast(RlRecord, None), (), tuple(Verdict(0.0, each) for each in reasons))


def test_model_that_does_not_answer_in_form_is_refused_in_the_first_iteration() -> None:
    """With 64 responses: fewer may be bad luck, and one that has the form can be learned from."""
    broken = [group_of("no_box", "bad_form", "no_box", "cut_off")] * 15
    with pytest.raises(
        RolloutError, match=r"none of the 64 responses has the form .*no_box 31, cut_off 17, bad_form 15"
    ):
        check_answers([*broken, group_of("cut_off", "cut_off", "media_token", "no_box")], 1)
    check_answers([*broken, group_of("cut_off", "cut_off", "media_token", "not_equal")], 1)
    check_answers([*broken, group_of("cut_off", "cut_off", "media_token", "no_box")], 2)
    check_answers(broken, 1)
    check_answers([], 1)


def test_judges_are_asked_at_the_start(tmp_path: Path) -> None:
    """One that refuses is a mistake; one that is down may come back, and is named: its fallback is a reward."""
    judge, wrong, busy = Running("1.0"), Running("404"), Running("503")
    (tmp_path / "file").touch()
    cache, no_folder = str(tmp_path / "cache"), str(tmp_path / "file" / "cache")
    registry = tmp_path / "rewards.yaml"
    registry.write_text(f"sources: {{a: {{verifier: vqa}}}}\njudges: {{unused: {{url: '{wrong.url}', model: m}}}}")
    for url, kept, down, refused in (
        (judge.url, cache, "", ""),
        (busy.url, "", "reward.judge: the model m at url=.* does not answer .503 Server Error", ""),
        ("http://127.0.0.1:9/v1", "", "does not answer .ConnectionError", ""),
        (
            wrong.url,
            "",
            "",
            "reward.judge: the model m at url=.* does not answer .404 .* correct url, model or the key",
        ),
        (judge.url, no_folder, "", "reward.judge: cache=.*/file/cache cannot be written: Not a directory"),
    ):
        options = JudgeConfig(url=url, model="m", timeout=5.0, cache=kept)
        scorer = Scorer(RewardConfig(registry=str(registry), judge=options), "glm45v")
        with pytest.raises(ConfigError, match=refused) if refused else nullcontext():
            lines = scorer.check_judges()
            assert re.search(down, lines[0]) if down else not lines
        scorer.close()
    assert not list((tmp_path / "cache").iterdir())
    for each in (judge, wrong, busy):
        each.stop()


def test_judge_that_never_answers_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """Its fallback is a score like any other: without a word all rewards would be 0."""
    answers = Running("1.0")
    record = RlRecord("Which?", "a bird", "vqa", {}, "", "", "", thinks=True)
    response = ResponseToScore(
        record, "<think>.</think>\n<|begin_of_box|>some animal with wings<|end_of_box|>", "ended"
    )
    for url, score, warnings in (("http://127.0.0.1:9/v1", 0, 1), (answers.url, 1, 0)):
        caplog.clear()
        scorer = Scorer(RewardConfig(judge=JudgeConfig(url=url, model="m", timeout=5.0)), "glm45v")
        with caplog.at_level(logging.WARNING):
            [verdict] = scorer.score([response])
        scorer.close()
        assert verdict.score == score
        assert sum("has answered none of 2 requests" in line for line in caplog.messages) == warnings
    answers.stop()
