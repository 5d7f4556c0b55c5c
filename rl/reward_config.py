"""The keys of `reward`: how rollouts are scored."""

from __future__ import annotations

from dataclasses import dataclass, field

from model.config import ConfigError
from rewards.judge import JudgeConfig
from rewards.verdict import RewardError
from training.bounds import SHARE, Bound, check_bounds

PROCESSES = Bound(lambda value: 1 <= value <= 1024, "a number from 1 to 1024")


@dataclass
class RewardConfig:
    """Each record names its verifier; a registry may say more of its data source."""

    registry: str = ""  # YAML file of data sources and judges (docs/rewards.md); empty: what the records say
    processes: int = 2  # symbolic comparisons, and questions to judges, at the same time
    judge: JudgeConfig = field(default_factory=JudgeConfig)  # of data sources that name none; no url: there is none
    no_judge_score: float = 0.0  # score where no rule decides and there is no judge; they are counted

    def __post_init__(self) -> None:
        check_bounds("reward", self, {"processes": PROCESSES, "no_judge_score": SHARE})

    def check(self) -> None:
        """Check the judge.

        Raises:
            ConfigError: it cannot be asked.
        """
        if self.judge != JudgeConfig():
            try:
                self.judge.check()
            except RewardError as error:
                raise ConfigError(f"reward.{error}") from None
