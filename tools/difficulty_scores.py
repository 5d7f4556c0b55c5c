"""Scores of a model's answers to prompts, by the rewards of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data_pipeline.domains.rl_record import RlRecord
from data_pipeline.encoding.tokenizer import IMAGE, IMAGE_END, IMAGE_START, VIDEO, VIDEO_END, VIDEO_START
from model.config import ConfigError
from rl.config import RlConfig
from rl.iteration import UNDECIDED
from rl.reward_config import RewardConfig
from rl.rollouts import Finish, fingerprint
from rl.scoring import UNKNOWN, ResponseToScore, Scorer
from tools.difficulty_grades import DifficultyError
from training.config import load_config

MEDIA = (IMAGE, IMAGE_START, IMAGE_END, VIDEO, VIDEO_START, VIDEO_END)  # a rollout with one scores 0


class RunScores:
    """Scores answers as a run scores rollouts: verifier, form, registry and judge.

    Args:
        rewards: The keys of `reward`.
        form: Of the model's responses, one of rewards.answer.FORMS.

    Raises:
        ConfigError: The registry cannot be used.
    """

    def __init__(self, rewards: RewardConfig, form: str) -> None:
        self._scorer = Scorer(rewards, form)
        self._judges_answer = False  # nothing is asked of them where all shards are graded

    @property
    def fingerprint(self) -> str:
        """A hash of all that scores depend on beside prompts and answers."""
        return fingerprint(self._scorer.settings())

    def of_source(self, record: RlRecord, answers: list[str], label: str) -> list[float | None]:
        """Return the score of each answer; None where only a judge could give one.

        Args:
            record: The prompt.
            answers: With their special tokens.
            label: Name of the source of prompts that name none.

        Raises:
            DifficultyError: There is no such verifier.
            ConfigError: A judge does not answer.
        """
        if not self._judges_answer:
            if down := self._scorer.check_judges():
                raise ConfigError(f"{down[0]}: start it")
            self._judges_answer = True
        record = replace(record, source=record.source or label)
        responses = [ResponseToScore(record, answer, _finish(answer)) for answer in answers]
        verdicts = self._scorer.score(responses)
        if any(verdict.reason == UNKNOWN for verdict in verdicts):  # the shard was built by another version
            raise DifficultyError(f"there is no verifier {record.verifier!r}: build the prompts again")
        return [None if verdict.reason in UNDECIDED else verdict.score for verdict in verdicts]

    def close(self) -> None:
        """End the processes that score."""
        self._scorer.close()


def rewards_of(config: Sequence[Path] | None, pass_score: float | None) -> tuple[RewardConfig, float]:
    """Return the rewards of a run, and from which score on an answer is right.

    Args:
        config: The files of the run's configuration, the last one on top; None: the defaults.
        pass_score: What the user has given in its place.

    Raises:
        ConfigError, DataError: The configuration cannot be used.
        DifficultyError: Both say from which score on an answer is right, and differ.
    """
    if not config:
        return RewardConfig(), RlConfig().curriculum.pass_score if pass_score is None else pass_score
    run = load_config(RlConfig, config)
    if pass_score not in (None, run.curriculum.pass_score):
        raise DifficultyError(
            f"--pass-score {pass_score:g}, but curriculum.pass_score={run.curriculum.pass_score:g} in --config: "
            "give one of them"
        )
    return run.reward, run.curriculum.pass_score


def _finish(answer: str) -> Finish:
    return "media" if any(mark in answer for mark in MEDIA) else "ended"
