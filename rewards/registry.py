"""Registries: a YAML file that says how the answers of each data source are scored.

    sources:
      geometry: {verifier: math, form: glm45v}
      charts: {verifier: chart, settings: {tolerance: 0.05}, judge: small}
      chats: {verifiable: false, judge: small}
    judges:
      small: {url: "http://localhost:8000/v1", model: glm, samples: 3}

A key, a verifier, a setting or a judge that does not exist is an error, which names the nearest one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from common.nearest import suggestion
from rewards.judge import JudgeConfig
from rewards.scoring import Task, check_form
from rewards.table import verifier_named
from rewards.verdict import Item, RewardError
from rewards.verifier import check_settings

T = TypeVar("T")


@dataclass
class SourceConfig:
    """How the answers of one data source are scored."""

    verifier: str = ""  # a name of rewards.table; empty only where `verifiable` is false
    settings: dict[str, Any] = field(default_factory=dict)  # of the verifier; a record's own settings go before these
    form: str = "either"  # of responses: glm45v, glm41v, either
    thinking: bool = True  # whether a response must have a thought
    verifiable: bool = True  # false: no answer is right or wrong, and a box is refused
    judge: str = ""  # a name under `judges`; empty: none is asked

    def task(self, item: Item) -> Task:
        """Return how the responses to one prompt of this source are scored."""
        settings = {**self.settings, **item.settings}
        item = Item(item.question, item.reference, settings)
        return Task(verifier_named(self.verifier or "exact"), item, self.form, self.thinking, self.verifiable)  # type: ignore[arg-type]


@dataclass
class Registry:
    """Data sources and judges by name."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    judges: dict[str, JudgeConfig] = field(default_factory=dict)

    def source(self, name: str) -> SourceConfig:
        """Return a data source. Raises RewardError if there is none of this name."""
        if name not in self.sources:
            known = f": the sources are {', '.join(self.sources) or 'none'}"
            raise RewardError(f"the registry has no source {name!r}{suggestion(name, self.sources) or known}")
        return self.sources[name]


def read_registry(path: Path) -> Registry:
    """Read a registry.

    Raises:
        RewardError: It cannot be read, or a key or a value is wrong.
    """
    try:
        given = OmegaConf.to_container(OmegaConf.create(path.read_text("utf-8")), resolve=True)
    except OSError as error:
        raise RewardError(f"{path}: {error.strerror}") from error
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise RewardError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    try:
        return parse_registry(given)
    except RewardError as error:
        raise RewardError(f"{path}: {error}") from error


def parse_registry(given: Any) -> Registry:
    """Check the content of a registry. Raises RewardError as `read_registry`."""
    content = _mapping(given, "a registry", {"sources", "judges"})
    if not content.get("sources") and not content.get("judges"):
        raise RewardError("it has neither sources nor judges: write them, or name no registry")
    judges = {
        name: _options(JudgeConfig, options, f"judges.{name}") for name, options in _named(content, "judges").items()
    }
    for name, judge in judges.items():
        _within(f"judges.{name}", judge.check)
    sources = {
        name: _options(SourceConfig, options, f"sources.{name}") for name, options in _named(content, "sources").items()
    }
    for name, source in sources.items():
        _within(f"sources.{name}", lambda source=source: _check_source(source, judges))
    return Registry(sources, judges)


def _check_source(source: SourceConfig, judges: Mapping[str, JudgeConfig]) -> None:
    if not source.verifier and source.verifiable:
        raise RewardError("verifier is missing: name one, also beside settings alone, or write `verifiable: false`")
    if source.verifier:
        check_settings(verifier_named(source.verifier), Item(settings=source.settings))
    check_form(source.form)
    if source.judge and source.judge not in judges:
        known = f": the judges are {', '.join(judges) or 'none'}"
        raise RewardError(f"there is no judge {source.judge!r}{suggestion(source.judge, judges) or known}")


def _within(where: str, check: Any) -> None:
    try:
        check()
    except RewardError as error:
        raise RewardError(f"{where}: {error}") from error


def _named(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = content.get(key) or {}
    if not isinstance(found, dict):
        raise RewardError(f"{key}: give a mapping of names")
    return {str(name): options for name, options in found.items()}


def _mapping(given: Any, what: str, known: set[str]) -> Mapping[str, Any]:
    if not isinstance(given, dict):
        raise RewardError(f"{what} must be a mapping with the keys {', '.join(sorted(known))}")
    for key in given:
        if key not in known:
            hint = suggestion(str(key), known) or f": the keys are {', '.join(sorted(known))}"
            raise RewardError(f"{what} has no key {key!r}{hint}")
    return given


def _options(schema: type[T], given: Any, where: str) -> T:
    """Return a dataclass with the options that are given, each of the type of its default."""
    defaults = schema()
    kinds = {option.name: type(getattr(defaults, option.name)) for option in fields(schema)}  # type: ignore[arg-type]
    content = _mapping({} if given is None else given, where, set(kinds))
    for name, value in content.items():
        if type(value) is not kinds[name] and not (kinds[name] is float and type(value) is int):
            raise RewardError(f"{where}: {name} is {value!r}, not of type {kinds[name].__name__}")
    return schema(**content)
