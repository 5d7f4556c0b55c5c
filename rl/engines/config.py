"""The keys of `rollout`: what draws rollouts, how long they may be, and how much its probabilities may differ."""

from __future__ import annotations

from dataclasses import dataclass, fields

from model.config import ConfigError
from rl.engines.servers_config import ServersConfig
from training.bounds import NOT_NEGATIVE, POSITIVE, Bound, check_bounds

ENGINES = ("embedded", "vllm", "sglang")
ANSWER = Bound(
    lambda value: value >= 4, "4 or more, which hold a token between the two of a box, and the end of the turn"
)
ROUTER_REPLAY = ("none", "engine")


@dataclass
class RolloutConfig(ServersConfig):
    """How rollouts are drawn: at temperature 1, from the model's whole distribution. All numbers are this project's."""

    # embedded: in this run's processes; vllm: servers; sglang: servers (not run)
    engine: str = "embedded"
    max_thinking_tokens: int = 8192  # longest thought; then its end is inserted (rollout.force_answer)
    max_answer_tokens: int = 2048  # longest answer after the thought; without thinking, longest response
    force_answer: bool = True  # end a thought that is too long, and let the model answer; false: the rollout is cut off
    # none: routers choose experts in training; engine: they choose those that the engine chose (router replay)
    router_replay: str = "none"
    # most that the weight may be which corrects a token for the engine's own probability; 0: no correction
    tis: float = 2.0
    # mean difference of log-probabilities between engine and policy above which the run stops; 0: never
    max_mismatch: float = 0.05
    # iterations whose rollouts stay on disk; all since the newest checkpoint stay in any case; 0: all
    keep_last: int = 16
    embedded_rows: int = 256  # embedded: responses that are drawn together, at most
    embedded_cache_gb: float = 4.0  # embedded: GB of their keys and values, at most, on each lead

    def check_engine(self) -> None:
        """Check the keys together.

        Raises:
            ConfigError: a value cannot work.
        """
        if self.engine not in ENGINES:
            raise ConfigError(f"rollout.engine={self.engine!r}: choose one of {', '.join(ENGINES)}")
        self._check_router_replay()
        check_bounds("rollout", self, {"max_thinking_tokens": POSITIVE, "max_answer_tokens": ANSWER})
        check_bounds("rollout", self, dict.fromkeys(("tis", "max_mismatch", "keep_last"), NOT_NEGATIVE))
        check_bounds("rollout", self, dict.fromkeys(("embedded_rows", "embedded_cache_gb"), POSITIVE))
        if self.engine == "embedded":
            self._refuse_servers()
        else:
            self.check(self.engine)
            self._refuse_embedded()
        if 0 < self.tis < 1:
            raise ConfigError(f"rollout.tis={self.tis:g} would shrink every token's weight; give 1 or more, or 0")

    @property
    def has_router_replay(self) -> bool:
        """Whether training uses the experts that the engine chose."""
        return self.router_replay == "engine"

    def _check_router_replay(self) -> None:
        if self.router_replay not in ROUTER_REPLAY:
            raise ConfigError(f"rollout.router_replay={self.router_replay!r}: choose one of {', '.join(ROUTER_REPLAY)}")
        if self.has_router_replay and self.engine != "embedded":
            raise ConfigError(
                "rollout.router_replay=engine needs an engine that tells which experts it chose, and "
                f"rollout.engine={self.engine} does not: set rollout.router_replay=none, or rollout.engine=embedded"
            )

    def _refuse_servers(self) -> None:
        """Refuse keys of servers that were set although there are none."""
        unused = ServersConfig()
        for item in fields(ServersConfig):
            if (value := getattr(self, item.name)) != getattr(unused, item.name):
                raise ConfigError(
                    f"rollout.{item.name}={value} is of servers, and rollout.engine=embedded has none: remove it, or "
                    "set rollout.engine=vllm"
                )

    def _refuse_embedded(self) -> None:
        """Refuse keys of the embedded engine that were set although servers draw."""
        for name in ("embedded_rows", "embedded_cache_gb"):
            if (value := getattr(self, name)) != getattr(RolloutConfig(), name):
                raise ConfigError(
                    f"rollout.{name}={value} is of the embedded engine, and rollout.engine={self.engine}: remove it, "
                    "or set rollout.engine=embedded"
                )
