"""Rollouts -> scores: the record's verifier, the registry's judge, and what has no score."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline.domains.rl_record import RlRecord
from model.config import ConfigError
from rl.reward_config import RewardConfig
from rl.scoring import ResponseToScore, Scorer

pytestmark = pytest.mark.fast


def record(verifier: str, reference: str, source: str = "charts") -> RlRecord:
    return RlRecord("How many?", reference, verifier, {}, source, "", "", thinks=True)


def text(answer: str) -> str:
    return f"<think>Well.</think>\n<|begin_of_box|>{answer}<|end_of_box|>"


def test_scores_follow_the_records_verifier() -> None:
    scorer = Scorer(RewardConfig(), "glm45v")
    responses = [
        ResponseToScore(record("math", "1/2"), text("0.5"), "ended"),
        ResponseToScore(record("math", "1/2"), text("0.6"), "ended"),
        ResponseToScore(record("chart", "100"), text("101"), "ended"),
        ResponseToScore(record("math", "7"), text("7"), "media"),
        ResponseToScore(record("math", "7"), "<think>Well, it", "truncated"),
        ResponseToScore(record("gone", "7"), text("7"), "ended"),
        ResponseToScore(record("vqa", "a bird"), text("some animal with wings"), "ended"),
    ]
    verdicts = scorer.score(responses)
    scorer.close()
    assert [verdict.score for verdict in verdicts] == [1, 0, 1, 0, 0, 0, 0]
    assert [verdict.reason for verdict in verdicts[3:]] == ["media_token", "cut_off", "bad_record", "no_judge"]


def test_answer_form_is_the_models() -> None:
    scorer = Scorer(RewardConfig(), "glm41v")
    answered = "<think>Well.</think><answer><|begin_of_box|>7<|end_of_box|></answer>"
    verdicts = scorer.score([ResponseToScore(record("math", "7"), each, "ended") for each in (answered, text("7"))])
    scorer.close()
    assert [verdict.score for verdict in verdicts] == [1, 0]


def test_registry_says_more_of_a_data_source(tmp_path: Path) -> None:
    file = tmp_path / "rewards.yaml"
    file.write_text("sources:\n  charts: {verifier: chart, settings: {tolerance: 0.2}}\n  maps: {verifier: vqa}\n")
    scorer = Scorer(RewardConfig(registry=str(file), no_judge_score=0.25), "glm45v")
    verdicts = scorer.score([ResponseToScore(record("chart", "100"), text("115"), "ended")])
    assert verdicts[0].score == 1
    scorer.close()


def test_settings_change_with_the_content_of_the_registry(tmp_path: Path) -> None:
    """Verdicts on disk are not used again when a rule has changed."""
    file, settings = tmp_path / "rewards.yaml", []
    for tolerance in (0.2, 0.3, 0.3):
        file.write_text(f"sources:\n  charts: {{verifier: chart, settings: {{tolerance: {tolerance}}}}}\n")
        settings.append(json.dumps(Scorer(RewardConfig(registry=str(file)), "glm45v").settings()))
    assert settings[0] != settings[1] == settings[2]


def test_each_verdict_is_a_sign_of_progress() -> None:
    scorer, signs = Scorer(RewardConfig(), "glm45v"), []
    scorer.score([ResponseToScore(record("math", "7"), text("7"), "ended")] * 5, lambda: signs.append(1))
    scorer.close()
    assert len(signs) == 5


def test_unusable_registry_is_an_error_that_names_it(tmp_path: Path) -> None:
    file = tmp_path / "rewards.yaml"
    file.write_text("sources:\n  charts: {verifier: chrat}\n")
    with pytest.raises(ConfigError, match=r"reward.registry: .*rewards.yaml: .*'chrat'.*chart"):
        Scorer(RewardConfig(registry=str(file)), "glm45v")
