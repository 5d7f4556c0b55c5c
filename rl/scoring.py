"""Rollouts -> scores, on the main process: the rules of `rewards`, and a judge where no rule decides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline.domains.rl_record import RlRecord
from model.config import ConfigError
from rewards import workers
from rewards.judge import Judge
from rewards.registry import Registry, SourceConfig, read_registry
from rewards.scoring import Task, score_response, settle
from rewards.verdict import Item, RewardError, Verdict
from rl.reward_config import RewardConfig
from rl.rollouts import Finish
from training.metrics import logger

FORMS = {"glm45v": "glm45v", "glm46v": "glm45v", "glm41v": "glm41v"}  # of responses, by the form of chats
# The reasons of this module beside those of `rewards`.
MEDIA_TOKEN, NO_JUDGE, UNKNOWN = "media_token", "no_judge", "bad_record"


@dataclass(frozen=True)
class ResponseToScore:
    """What is scored: a response and what is known of its prompt."""

    record: RlRecord
    text: str  # with special tokens
    finish: Finish


def read_registry_of(config: RewardConfig) -> Registry:
    """Return the registry of a run; an empty one if there is none.

    Raises:
        ConfigError: it cannot be used.
    """
    try:
        return read_registry(Path(config.registry)) if config.registry else Registry()
    except RewardError as error:
        raise ConfigError(f"reward.registry: {error}") from None


class Scorer:
    """Scores responses.

    Args:
        config: the keys of `reward`.
        form: of the responses: FORMS has those of models that are trained.

    Raises:
        ConfigError: the registry cannot be used.
    """

    def __init__(self, config: RewardConfig, form: str) -> None:
        self.config, self.form = config, form
        self._pool: ThreadPoolExecutor | None = None  # from the first score on
        self.registry = read_registry_of(config)
        judges = {**self.registry.judges, **({"": config.judge} if config.judge.url else {})}
        self._judges = {name: Judge(judge) for name, judge in judges.items()}

    def check_judges(self) -> list[str]:
        """Ask every judge that may be asked once. Returns a line for each that is down.

        Raises:
            ConfigError: one refuses to answer, or its replies cannot be kept.
        """
        named = {source.judge for source in self.registry.sources.values()} | {""}
        down = []
        for name in sorted(named & self._judges.keys()):
            where = f"reward.registry={self.config.registry}: judges.{name}" if name else "reward.judge"
            try:
                why = self._judges[name].check()
            except RewardError as error:
                raise ConfigError(f"{where}: {error}") from None
            down += [f"{where}: {why}"] if why else []
        return down

    def settings(self) -> dict[str, Any]:
        """Return what scores depend on beside responses and prompts, as JSON types."""
        return {"reward": asdict(self.config), "registry": asdict(self.registry), "form": self.form}

    def score(self, responses: Sequence[ResponseToScore], on_wait: Callable[[], None] = lambda: None) -> list[Verdict]:
        """Return a verdict on each response. Never raises: what cannot be scored scores 0, for a reason.

        Args:
            responses: what is scored.
            on_wait: called after each. What it raises ends the scoring.
        """
        if self._pool is None:
            workers.configure(self.config.processes)
            self._pool = ThreadPoolExecutor(self.config.processes)
        before = {name: Counter(judge.counts) for name, judge in self._judges.items()}
        verdicts = []
        for verdict in self._pool.map(self._verdict, responses):
            verdicts.append(verdict)
            on_wait()
        for name, judge in self._judges.items():
            new = judge.counts - before[name]
            if new["asked"] and new["asked"] == new["failed"]:
                logger.warning(
                    "the judge %s has answered none of %d requests: look at its url, model and server",
                    name or "reward.judge",
                    new["asked"],
                )
        return verdicts

    def close(self) -> None:
        """End the processes and threads that score."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            workers.shared().close()

    def task(self, record: RlRecord) -> tuple[Task, Judge | None]:
        """Return how the responses to a prompt are scored, and the judge that may be asked.

        Raises:
            RewardError: the verifier is unknown.
        """
        source = self.registry.sources.get(record.source, SourceConfig())
        source = replace(source, verifier=record.verifier, form=self.form, thinking=record.thinks)
        task = source.task(Item(record.question, record.reference, record.settings))
        return task, self._judges.get(source.judge)

    def _verdict(self, response: ResponseToScore) -> Verdict:
        if response.finish == "media":
            return Verdict(0.0, MEDIA_TOKEN)
        try:
            task, judge = self.task(response.record)
        except RewardError:
            return Verdict(0.0, UNKNOWN)
        scored = score_response(response.text, task)
        if isinstance(scored.outcome, Verdict):
            return scored.outcome
        if judge is None:
            return Verdict(self.config.no_judge_score, NO_JUDGE)
        return settle(scored.outcome, scored.answer, task.item, judge)
