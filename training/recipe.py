"""Reads a configuration in layers: files over their bases, later files over earlier ones, overrides over all.

    configs/glm45v/sft.yaml      base: ../base/sft.yaml      a path or a list of paths, relative to this file
    --config A --config B        B over A
    optimizer.lr=1e-5            over both

Sections are merged key by key, and a list replaces a list. Each layer is checked by itself, so that a wrong key is
reported with the file it stands in.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from model.config import ConfigError
from training.keys import Key, flatten, keys_of, probable_keys, unknown_key

BASE = "base"  # the key that names the files under a file
COMMAND_LINE, DEFAULT = "command line", "default"


@dataclass(frozen=True)
class Layer:
    """The keys of one file without those of its bases, or of one override."""

    origin: str  # the file, or "command line"
    content: Any  # of OmegaConf

    @property
    def plain(self) -> Any:
        """Its content as dictionaries and lists."""
        return OmegaConf.to_container(self.content)

    @property
    def where(self) -> str:
        """What comes before a message about it: the file; nothing for an override, which names itself."""
        return "" if self.origin == COMMAND_LINE else f"{self.origin}: "


def read_layers(files: Sequence[Path], overrides: Sequence[str] = ()) -> list[Layer]:
    """Return the layers of a configuration, the lowest first.

    Raises:
        ConfigError: a file or an override cannot be read, or the bases of a file run in a circle.
    """
    layers = [layer for file in files for layer in _read_file(file, f"--config {file}", ())]
    return layers + [Layer(COMMAND_LINE, _read_override(override)) for override in overrides]


def last_value(layers: Sequence[Layer], section: str, name: str) -> object:
    """Return what the highest layer that has a key gives it, unchecked; None if none has it."""
    found = None
    for layer in layers:
        keys = layer.plain.get(section) if isinstance(layer.plain, dict) else None
        found = keys[name] if isinstance(keys, dict) and name in keys else found
    return found


def merge(schema: type, layers: Sequence[Layer]) -> Any:
    """Return the keys of `schema`, with its defaults under `layers`.

    Raises:
        ConfigError: a key is unknown, or a value is of the wrong type or not allowed.
    """
    known = {key.name: key for key in keys_of(schema)}
    merged: Any = OmegaConf.structured(schema)
    for layer in layers:
        try:
            _check_section(layer.plain, known, prefix="")
            merged = OmegaConf.merge(merged, layer.content)
        except ConfigError as error:
            raise ConfigError(f"{layer.where}{error}") from None
        except OmegaConfBaseException as error:
            raise ConfigError(f"{layer.where}{_reason(error)}") from None
    try:
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:  # of a reference such as ${train.output_dir}
        raise ConfigError(_reason(error)) from None


def commented_yaml(config: Any, layers: Sequence[Layer]) -> str:
    """Return a configuration as YAML in which a comment says where each value comes from.

    optimizer:
      lr: 2.0e-05  # configs/glm45v/sft.yaml
      eps: 1.0e-08  # default
    """
    origins = {name: layer.origin for layer in layers for name, _ in flatten(layer.plain)}
    return "".join(f"{line}\n" for line in _lines(asdict(config), origins, prefix=""))


def _lines(section: Mapping[str, Any], origins: Mapping[str, str], prefix: str) -> Iterator[str]:
    indent = "  " * prefix.count(".")
    for name, value in section.items():
        full = f"{prefix}{name}"
        if isinstance(value, dict):
            yield f"{indent}{name}:"
            yield from _lines(value, origins, f"{full}.")
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            yield f"{indent}{name}:  # {origins.get(full, DEFAULT)}"
            yield from (f"{indent}  - {_flow(item)}" for item in value)
        else:
            yield f"{indent}{name}: {_flow(value)}  # {origins.get(full, DEFAULT)}"


def _flow(value: Any) -> str:
    """Return a value as YAML on one line."""
    style = '"' if isinstance(value, str) and "\n" in value else None
    text = yaml.safe_dump(value, default_flow_style=True, default_style=style, width=10**9, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


# --- files and overrides ----------------------------------------------------------------------------------------------


def _read_file(file: Path, named_by: str, above: tuple[Path, ...]) -> Iterator[Layer]:
    """Yield the layers of a file: those of its bases, then its own.

    Args:
        file: the file.
        named_by: who names it, for messages.
        above: the files of which it is a base, the highest first.
    """
    if not file.is_file():
        raise ConfigError(f"{named_by}: {'this is a folder' if file.is_dir() else 'there is no such file'}")
    chain = (*above, file)
    if file.resolve() in [one.resolve() for one in above]:
        raise ConfigError(f"{named_by}: the bases run in a circle: {' -> '.join(map(_shown, chain))}")
    content = _load(file, named_by)
    plain: Any = OmegaConf.to_container(content)
    bases = plain.get(BASE, []) if isinstance(plain, dict) else []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) and base for base in bases):
        raise ConfigError(f"{_shown(file)}: {BASE}={bases!r}: give the path of a file, or a list of paths")
    for base in bases:
        yield from _read_file(file.parent / base, f"{_shown(file)}: {BASE} {base}", chain)
    if isinstance(plain, dict):
        content.pop(BASE, None)
    yield Layer(_shown(file), content)


def _shown(file: Path) -> str:
    return os.path.normpath(file)


def _load(file: Path, named_by: str) -> Any:
    try:
        return OmegaConf.load(file)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{_shown(file)} is not valid YAML: {str(error).splitlines()[0]}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{_shown(file)}: {_reason(error)}") from None
    except OSError as error:  # OmegaConf raises it for a file that holds a single number, too
        raise ConfigError(f"{named_by} cannot be read: {error.strerror or 'it holds no keys'}") from None


def _read_override(override: str) -> Any:
    if "=" not in override:
        raise ConfigError(f"{override!r} is not an override; write dotted.key=value")
    # "key=" sets an empty string, not YAML's null.
    text = f"{override}''" if override.endswith("=") else override
    try:
        return OmegaConf.from_dotlist([text])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{override!r} cannot be read: {str(error).splitlines()[0]}") from None


def _reason(error: OmegaConfBaseException) -> str:
    key = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
    return f"{key}{str(error).splitlines()[0]}"


# --- checks of one layer ----------------------------------------------------------------------------------------------


def _check_section(content: Any, known: Mapping[str, Key], prefix: str) -> None:
    """Check names, and the kinds that OmegaConf converts or reports badly."""
    if not isinstance(content, dict):
        raise ConfigError(f"{prefix.rstrip('.') or 'the file'} is {content!r}: give its keys, each with a value")
    for name, value in content.items():
        key = known.get(f"{prefix}{name}")
        if key is None:
            below = value if isinstance(value, dict) else ()
            names, keys = [f"{prefix}{name}", *(f"{prefix}{name}.{leaf}" for leaf in below)], list(known.values())
            raise ConfigError(unknown_key(next((n for n in names if probable_keys(n, keys)), names[0]), keys))
        if isinstance(value, str) and "${" in value:  # OmegaConf resolves and checks it
            continue
        if key.is_section:
            _check_section(value, known, f"{key.name}.")
        elif get_origin(key.kind) is list:
            _check_list(value, key, known)
        elif key.kind is bool and isinstance(value, int) and value not in (0, 1):
            raise ConfigError(f"{key.name}={value}: give true or false")


def _check_list(value: Any, key: Key, known: Mapping[str, Key]) -> None:
    if not isinstance(value, list):
        raise ConfigError(f"{key.name}={value!r}: give a list, {key.name}=[...]")
    if any(is_dataclass(item) for item in getattr(key.kind, "__args__", ())):
        for item in value:
            _check_section(item, known, f"{key.name}[].")
