"""Recipes: YAML files with a list of filters, which are applied from top to bottom, each with its options.

    filters:
      - resolution: {min_side: 64}
      - caption_length: {min_characters: 5, domains: [image_text]}
      - near_duplicate_images
      - my_filters:Loud: {max_marks: 3}
    recaption: {command: python caption.py, ratio: 0.5}
    shard_bytes: 1000000000

A name is in FILTERS, or is the module and class of a user's own filter. Paths are relative to the working folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from common.nearest import suggestion
from data_pipeline.curation.concepts import ConceptBalance
from data_pipeline.curation.contamination import ContaminatedImages, ContaminatedTexts
from data_pipeline.curation.duplicates import (
    DuplicateVideoPairs,
    ExactDuplicateImages,
    ExactDuplicateTexts,
    NearDuplicateImages,
    NearDuplicateTexts,
)
from data_pipeline.curation.filters import Filter, SetFilter
from data_pipeline.curation.hashing import digest
from data_pipeline.curation.images import Aspect, Resolution, SolidColour
from data_pipeline.curation.recaption import Recaption
from data_pipeline.curation.relevance import Relevance, load_function
from data_pipeline.curation.structure import Albums, Boxes
from data_pipeline.curation.texts import CaptionLength, LanguageMixing, RepeatedText
from data_pipeline.curation.videos import VideoIntegrity
from data_pipeline.domains import DOMAINS
from data_pipeline.errors import DataError

FILTERS: dict[str, type[Filter | SetFilter]] = {
    "resolution": Resolution,
    "aspect": Aspect,
    "solid_colour": SolidColour,
    "caption_length": CaptionLength,
    "repeated_text": RepeatedText,
    "language_mixing": LanguageMixing,
    "albums": Albums,
    "boxes": Boxes,
    "video_integrity": VideoIntegrity,
    "contaminated_texts": ContaminatedTexts,
    "contaminated_images": ContaminatedImages,
    "relevance": Relevance,
    "exact_duplicate_images": ExactDuplicateImages,
    "near_duplicate_images": NearDuplicateImages,
    "exact_duplicate_texts": ExactDuplicateTexts,
    "near_duplicate_texts": NearDuplicateTexts,
    "duplicate_video_pairs": DuplicateVideoPairs,
    "concept_balance": ConceptBalance,
}
T = TypeVar("T")
_SYNONYMS = {"picture": "image", "clip": "video"}  # words that users may expect in names -> words in names
_KEYS = ("filters", "recaption", "shard_bytes")
SHARD_BYTES = 1 << 30


@dataclass(frozen=True)
class Recipe:
    """Filters with their options, and what else a curation is told."""

    filters: list[tuple[str, Filter | SetFilter]]  # (name, filter) in order
    recaption: Recaption | None  # None: keep the captions
    shard_bytes: int = SHARD_BYTES  # size of a shard

    def resolved(self) -> dict[str, Any]:
        """Return all options, with defaults, in the form of the file."""
        shown: dict[str, Any] = {"filters": [{name: asdict(step)} for name, step in self.filters]}
        if self.recaption is not None:
            shown["recaption"] = asdict(self.recaption)
        return {**shown, "shard_bytes": self.shard_bytes}

    def text(self) -> str:
        """Return all options, with defaults, as YAML."""
        return OmegaConf.to_yaml(OmegaConf.create(self.resolved()))

    def fingerprint(self) -> str:
        """Return a hash that changes with any option, and with the size or time of a file or folder in an option."""
        named = sorted({value for value in _strings(self.resolved()) if 0 < len(value) < 4096 and Path(value).exists()})
        files = [file for name in named for file in sorted([Path(name), *Path(name).glob("*")])]
        stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return digest(json.dumps([self.text(), stamps]).encode()).hex()


def read_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        DataError: The file cannot be read, or a filter or option is wrong. The message has the nearest known name.
    """
    try:
        return recipe_of(path.read_text("utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as YAML: {error}") from error


def recipe_of(text: str) -> Recipe:
    """Parse the text of a recipe. Raises DataError as `read_recipe`."""
    given = OmegaConf.to_container(OmegaConf.create(text), resolve=True)
    if not isinstance(given, dict):
        raise DataError("a recipe must be a mapping with the key `filters`")
    return parse_recipe({str(key): value for key, value in given.items()})


def parse_recipe(given: dict[str, Any]) -> Recipe:
    """Check the content of a recipe. Raises DataError as `read_recipe`."""
    for key in given:
        if key not in _KEYS:
            raise DataError(f"a recipe has no key {key!r}{_hint(key, _KEYS)}")
    if not isinstance(given.get("filters"), list):
        raise DataError("filters: give a list, such as `- resolution: {min_side: 64}`")
    filters = [_parse_filter(entry) for entry in given["filters"]]
    recaption = None
    if given.get("recaption") is not None:
        recaption = with_options(Recaption, "recaption", given["recaption"])
        recaption.check()
    shard_bytes = given.get("shard_bytes", SHARD_BYTES)
    if not isinstance(shard_bytes, int) or shard_bytes < 1:
        raise DataError(f"shard_bytes is {shard_bytes!r}: give a positive number")
    return Recipe(filters, recaption, shard_bytes)


def _parse_filter(entry: Any) -> tuple[str, Filter | SetFilter]:
    """Return the (name, filter) of an entry of the list."""
    [(name, options)] = entry.items() if isinstance(entry, dict) and len(entry) == 1 else [(entry, None)]
    if not isinstance(name, str):
        raise DataError(f"filters: {entry!r} is not the name of one filter, with its options after a colon")
    step = with_options(_filter_class(name), name, options)
    for domain in step.domains:
        if domain not in DOMAINS:
            raise DataError(f"{name}.domains: there is no domain {domain!r}{_hint(domain, DOMAINS)}")
    step.check()
    return name, step


def with_options(schema: type[T], name: str, options: Any) -> T:
    """Return an instance of a dataclass with these options.

    Args:
        schema: The dataclass.
        name: Its name in messages.
        options: A mapping; None for defaults.

    Raises:
        DataError: An option is unknown or its value has the wrong type.
    """
    if options is None:
        options = {}
    if not isinstance(options, dict):
        raise DataError(f"{name}: {options!r} is not a mapping of options, such as {{min: 3}}")
    known = [option.name for option in fields(schema)]  # type: ignore[arg-type]
    for option in options:
        if option not in known:
            raise DataError(f"{name} has no option {option!r}{_hint(str(option), known)}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(options))
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise DataError(f"{name}: {str(error).splitlines()[0]}") from error


def _filter_class(name: str) -> type[Filter | SetFilter]:
    if name in FILTERS:
        return FILTERS[name]
    if ":" not in name:
        raise DataError(f"there is no filter {name!r}{_hint(name, FILTERS)}")
    found = load_function(name, "filters")
    if not (isinstance(found, type) and issubclass(found, Filter | SetFilter)):
        raise DataError(f"filters: {name} is not a subclass of data_pipeline.curation.filters.Filter")
    return found


def _hint(name: str, known: Iterable[str]) -> str:
    """Return the end of a message: the nearest known name, or all of them if none is near."""
    for synonym, word in _SYNONYMS.items():
        name = name.replace(synonym, word)
    return suggestion(name, known) or f": use one of {', '.join(known)}"


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _strings(part)
    elif isinstance(value, str):
        yield value
