"""Whether the rewards are what the user means: the registry, its judges and the verifiers against the run's prompts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from model.config import ConfigError
from rewards.judge import JudgeConfig
from rewards.registry import Registry, SourceConfig
from rewards.table import verifier_named
from rewards.verdict import Item, RewardError
from rewards.verifier import check_settings
from rl.reward_config import RewardConfig
from rl.scoring import FORMS, read_registry_of
from training.changed_keys import changes
from training.keys import flatten

ALWAYS_JUDGED = ("geoguess",)  # verifiers that never decide that an answer is right

Scored = Mapping[tuple[str, str], int]  # (data source, verifier) -> prompts


def check_rewards(config: RewardConfig, scored: Scored) -> Registry:
    """Check that every prompt can be scored.

    Args:
        config: The keys of `reward`.
        scored: What the prompts name.

    Returns:
        The registry; an empty one if there is none.

    Raises:
        ConfigError: The registry cannot be read, has settings that the prompts' verifier does not know, or only a judge
            could score prompts, and there is none.
    """
    registry = read_registry_of(config)
    for (name, verifier), prompts in sorted(scored.items()):
        source = registry.sources.get(name, SourceConfig())
        try:
            check_settings(verifier_named(verifier), Item(settings=source.settings))
        except RewardError as error:
            raise ConfigError(
                f"reward.registry={config.registry}: the settings of source {name!r} are for the verifier "
                f"{source.verifier or 'exact'}, but {prompts:,} of its prompts name {verifier}, which goes before: "
                f"{error}"
            ) from None
        has_judge = bool(source.judge or config.judge.url)
        if not has_judge and not config.no_judge_score and (verifier in ALWAYS_JUDGED or not source.verifiable):
            why = f"verifier {verifier}" if source.verifiable else "verifiable: false"
            raise ConfigError(
                f"{prompts:,} prompts of source {name!r} ({why}) can be scored by a judge alone, and there is none, so "
                "that all would score 0: set reward.judge.url and reward.judge.model, or name a judge in "
                "reward.registry"
            )
    return registry


def warnings_of_rewards(
    config: RewardConfig, registry: Registry, scored: Scored, chat_form: str, pass_score: float
) -> Iterator[str]:
    """Yield a line for everything of the rewards that has no effect, or hardly the one that is meant.

    Args:
        config: The keys of `reward`.
        registry: From `check_rewards`.
        scored: As there, of all prompts that the run scores.
        chat_form: How the model writes chats.
        pass_score: `curriculum.pass_score`.
    """
    for (name, verifier), prompts in sorted(scored.items()):
        source = registry.sources.get(name)
        if source and source.verifier and source.verifier != verifier:
            yield (
                f"reward.registry: source {name!r} has the verifier {source.verifier}, but {prompts:,} of its prompts "
                f"name {verifier}, which goes before"
            )
    used = {name for name, _ in scored} & registry.sources.keys()
    if unused := sorted(registry.sources.keys() - used):
        yield f"reward.registry has sources that no prompt is of: {', '.join(unused)}"
    if unused := sorted(registry.judges.keys() - {source.judge for source in registry.sources.values()}):
        yield f"reward.registry has judges that no source names: {', '.join(unused)}"
    for name in sorted(used):
        source = registry.sources[name]
        if source.form not in ("either", FORMS[chat_form]):
            yield (
                f"reward.registry: form {source.form} of source {name!r} has no effect, because this model's responses "
                f"are read in the form {FORMS[chat_form]}"
            )
        if source.settings and not source.verifiable:
            yield f"reward.registry: settings of source {name!r} have no effect, because verifiable is false"
        if not source.thinking:
            yield (
                f"reward.registry: thinking: false of source {name!r} has no effect, because each prompt says whether "
                "the model thinks"
            )
    yield from _warnings_of_judges(config, registry, pass_score)


def changes_of_registry(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for everything that a registry says otherwise than at the checkpoint.

    Args:
        before: The registry of the checkpoint, as JSON types.
        now: That of this run.
    """
    for part in ("sources", "judges"):
        for name in sorted(before[part].keys() | now[part].keys()):
            old, new, where = before[part].get(name), now[part].get(name), f"reward.registry: {part}.{name}"
            if old is None or new is None:
                yield f"{where} {'is new since' if old is None else 'is gone since'} the checkpoint"
            else:
                old, new = dict(flatten(old)), dict(flatten(new))
                yield from (f"{where}.{line}" for line in changes(old, dict.fromkeys(old) | new))


def _warnings_of_judges(config: RewardConfig, registry: Registry, pass_score: float) -> Iterator[str]:
    judges = {f"reward.registry: judges.{name}": judge for name, judge in registry.judges.items()}
    if config.judge.url:
        judges["reward.judge"] = config.judge
    for where, judge in judges.items():
        named = judge.key_variable != JudgeConfig.key_variable and judge.key_variable
        if named and not os.environ.get(named):
            yield f"{where}: the environment has no {named} (key_variable), so that no key is sent"
        if judge.fallback >= pass_score:
            yield (
                f"{where}: an answer without a verdict gets fallback={judge.fallback:g}, which counts as a pass "
                f"(curriculum.pass_score={pass_score:g})"
            )
    if config.no_judge_score >= pass_score:
        yield (
            f"reward.no_judge_score={config.no_judge_score:g}: an answer that nobody decides counts as a pass "
            f"(curriculum.pass_score={pass_score:g})"
        )
