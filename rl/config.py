"""The keys of `rl.train` beside those of every run. What the GLM-4.5V report (section 5) does not give is marked."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from model.config import ConfigError
from rl.advantages import ADVANTAGES
from rl.curriculum.config import CurriculumConfig
from rl.engines.config import RolloutConfig
from rl.expansion import ExpansionConfig
from rl.reward_config import RewardConfig
from training.bounds import NOT_NEGATIVE, POSITIVE, check_bounds
from training.config import CheckpointConfig, MoeConfig, RunConfig
from training.optimizer_config import OptimizerConfig
from training.validation_config import ValidationConfig

COMMAND = "rl.train"
# Keys of every run that have no meaning here, with what to use instead.
UNUSED_VALIDATION = ("steps", "samples", "samples_file", "samples_interval", "samples_max_tokens")


@dataclass
class PolicyConfig:
    """What a step learns from. The report gives clip-higher and no numbers: all defaults are this project's."""

    prompts: int = 128  # prompts that a step trains on, each with a group of rollouts
    group: int = 8  # rollouts of each prompt
    updates: int = 1  # optimizer updates of a step, each on a share of its prompts
    clip_low: float = 0.2  # how far below 1 the ratio of new to old probability may pull a token
    clip_high: float = 0.28  # how far above 1
    advantage: str = "grpo"  # grpo: (reward - mean) / standard deviation of the group; centred: reward - mean

    def __post_init__(self) -> None:
        check_bounds("rl", self, dict.fromkeys(("prompts", "updates"), POSITIVE))
        check_bounds("rl", self, dict.fromkeys(("clip_low", "clip_high"), NOT_NEGATIVE))
        if self.group < 2:
            raise ConfigError(f"rl.group={self.group}: the rollouts of a prompt are compared; give 2 or more")
        if not 0 < self.clip_low < 1 or not self.clip_high:
            raise ConfigError(
                f"rl.clip_low={self.clip_low:g} must be above 0 and below 1, and rl.clip_high={self.clip_high:g} above "
                "0: otherwise no token is learned after the first update"
            )
        if self.advantage not in ADVANTAGES:
            raise ConfigError(f"rl.advantage={self.advantage!r}: choose one of {', '.join(ADVANTAGES)}")
        if self.updates > self.prompts:
            raise ConfigError(f"rl.updates={self.updates} is above rl.prompts={self.prompts}: each needs a prompt")


@dataclass
class RlConfig(RunConfig):
    """Reinforcement learning. `train.steps` counts iterations: rollouts, rewards, `rl.updates` optimizer updates."""

    command: ClassVar[str] = COMMAND

    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            lr=1e-6, min_lr=1e-6, decay_style="constant", weight_decay=0.0, beta2=0.98
        )
    )
    # A bias or balance loss that moves between rollout and training would change the policy without a gradient.
    moe: MoeConfig = field(default_factory=lambda: MoeConfig(balance_loss_coeff=0.0, expert_bias_update_rate=0.0))
    # Iterations take minutes. Those since the newest checkpoint keep their rollouts on disk.
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(save_interval=50))
    rl: PolicyConfig = field(default_factory=PolicyConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    expansion: ExpansionConfig = field(default_factory=ExpansionConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)

    def check(self) -> None:
        """Check the keys of a run, those of this stage, and that there is a model to start from."""
        super().check()
        if not self.model.init_from:
            raise ConfigError(
                "model.init_from is empty: reinforcement learning starts from a model that answers already; name its "
                "folder"
            )
        for source in self.data.sources:
            if source.epochs:
                raise ConfigError(
                    f"source {source.label()!r} has epochs={source.epochs:g}: prompts are drawn by difficulty, again "
                    "and again; remove it"
                )
        if self.health.spike_factor:
            raise ConfigError(
                f"health.spike_factor={self.health.spike_factor:g}: a policy loss is near 0, of either sign, so that "
                "multiples of its median mean nothing; set it to 0"
            )
        if self.fp8.enabled and self.fp8.param_gather:
            raise ConfigError(
                "fp8.param_gather=true keeps weights in FP8 alone, which cannot be given to an engine; set it to false"
            )
        if self.lora.dropout:
            raise ConfigError(
                f"lora.dropout={self.lora.dropout:g}: rollouts are drawn without dropout, so that another policy would "
                "learn from them; set it to 0"
            )
        if self.rollout.has_router_replay and self.moe.expert_bias_update_rate:
            raise ConfigError(
                f"moe.expert_bias_update_rate={self.moe.expert_bias_update_rate:g}: with "
                "rollout.router_replay=engine the biases take no part in training, and moving them would only change "
                "what the engine chooses, without a gradient; set it to 0, or rollout.router_replay=none"
            )
        for name in UNUSED_VALIDATION:
            if getattr(self.validation, name) != getattr(ValidationConfig(), name):
                raise ConfigError(
                    f"validation.{name} has no meaning in {COMMAND}, whose validation answers every held-out prompt "
                    "once; remove it"
                )
        self.rollout.check_engine()
        if self.rollout.engine == "embedded" and self.rollout.embedded_rows < self.rl.group:
            raise ConfigError(
                f"rollout.embedded_rows={self.rollout.embedded_rows} is below rl.group={self.rl.group}, whose "
                "responses are drawn together: raise it, or lower rl.group"
            )
        self.reward.check()

    def check_batch(self) -> None:
        """Check that only `rl.prompts` and `rl.group` say how much a step takes."""
        if self.train.global_batch_size:
            raise ConfigError(
                f"train.global_batch_size={self.train.global_batch_size} has no meaning in {COMMAND}: a step takes "
                "rl.prompts x rl.group rollouts, in as few packs as hold them; remove it"
            )

    def check_shares(self, world_size: int) -> None:
        """Nothing: packs are made for the ranks that there are."""

    def describe_packs(self, ranks: int) -> str:
        """Return what the packs of a step hold, for people."""
        rl = self.rl
        return (
            f"as few of {self.train.seq_length:,} tokens as hold {rl.prompts:,} prompts x {rl.group} "
            f"rollouts, in {rl.updates} updates per step"
        )

    def warnings_of_domains(self, domains: Collection[str]) -> Iterator[str]:
        """Yield the keys that were set and have no effect, or not the one that is probably meant."""
        yield from _changed("data", self.data, ("prefetch", "too_long"), f"in {COMMAND}")
        if not self.expansion.enabled:
            yield from _changed("expansion", self.expansion, ("decay", "max_ratio"), "with expansion.enabled=false")
        if self.curriculum.sampler == "uniform":
            yield from _changed(
                "curriculum", self.curriculum, ("weights", "kind_floor"), "with curriculum.sampler=uniform"
            )
        rollout = self.rollout
        was_set = rollout.request_deadline != RolloutConfig().request_deadline
        if rollout.engine != "embedded" and was_set and rollout.request_deadline > rollout.deadline:
            yield (
                f"rollout.request_deadline={rollout.request_deadline:g} has no effect, because rollout.deadline="
                f"{rollout.deadline:g} ends all requests before"
            )
        for source in self.validation.sources:
            if source.weight != 1:
                yield f"the weight of held-out source {source.label()!r} has no effect in {COMMAND}"


def _changed(section: str, keys: Any, names: Sequence[str], when: str) -> Iterator[str]:
    """Yield a line for each of a section's keys that was set although it has no effect."""
    for name in names:
        if getattr(keys, name) != getattr(type(keys)(), name):
            yield f"{section}.{name} has no effect {when}"
