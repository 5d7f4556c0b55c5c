"""Images of HTML pages: which files an <img> offers, and the first of them that can be used."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from bs4.element import Tag

from data_pipeline.errors import BadSample
from data_pipeline.inputs.draft import Media
from data_pipeline.inputs.flow import image_media
from data_pipeline.inputs.references import read_reference
from data_pipeline.media.image_files import probe_image

SMALL_IMAGE = "small_image"
# Where scripts find the image that they load when it is scrolled into view; `src` is a placeholder until then.
_LAZY_SOURCES = (
    "data-src",
    "data-original",
    "data-lazy-src",
    "data-lazy",
    "data-original-src",
    "data-actualsrc",
    "data-hi-res-src",
    "data-full-src",
    "data-echo",
    "data-url",
)
_SOURCE_SETS = ("srcset", "data-srcset", "data-lazy-srcset", "data-original-set")
_PLACEHOLDER = re.compile(r"^data:|placeholder|blank|spacer|loading|lazy|lqip|transparent|1x1", re.IGNORECASE)


@dataclass(frozen=True)
class ImageRules:
    """Which images of a document are used."""

    folder: Path  # of the document
    min_side: int  # pixels; smaller images are not used
    allow_outside: bool  # images may be outside `folder`


def find_image(tag: Tag, rules: ImageRules) -> Media | None:
    """Return the first usable file that an <img> offers, or None if it offers none at all.

    Raises:
        BadSample: No file can be used. The reason is that of the first one.
    """
    failure: BadSample | None = None
    for reference in references(tag):
        try:
            media = image_media(read_reference(reference, rules.folder, allow_outside=rules.allow_outside))
        except BadSample as error:
            failure = failure or error
            continue
        if min(probe_image(media.data)) < rules.min_side:  # a placeholder until the actual image is loaded
            failure = failure or BadSample(
                SMALL_IMAGE, f"{reference[:60]}: a side is shorter than {rules.min_side} pixels"
            )
            continue
        return media
    if failure is not None:
        raise failure
    return None


def references(tag: Tag) -> list[str]:
    """Return what an <img> offers, best first: its src or a lazy form of it, then srcset from the largest down."""
    shown = [str(tag["src"])] if tag.get("src") else []
    lazy = [str(tag[name]) for name in _LAZY_SOURCES if tag.get(name)]
    lazy_first = not shown or _PLACEHOLDER.search(shown[0]) or "lazy" in str(tag.get("class", "")).lower()
    direct = [*lazy, *shown] if lazy_first else [*shown, *lazy]
    parent = tag.find_parent("picture")
    tags = [tag, *(parent.find_all("source") if parent is not None else ())]
    sets = [str(each[name]) for each in tags for name in _SOURCE_SETS if each.get(name)]
    offered = [candidate for entry in sets for candidate in parse_srcset(entry)]
    offered.sort(key=lambda pair: -pair[1])
    return [*direct, *(reference for reference, _ in offered)]


def parse_srcset(srcset: str) -> list[tuple[str, float]]:
    """Return the (reference, width or density) pairs of a srcset, by HTML's rule: commas in data: URIs are allowed.

    `a.jpg 1x, b.jpg 2x` -> [("a.jpg", 1.0), ("b.jpg", 2.0)]
    """
    found = []
    for match in re.finditer(r"\s*,*\s*(\S*[^\s,])(?:\s+([\d.]+)[wxh])?\s*(?:,|$|(?=\s))", srcset):
        try:
            found.append((match[1], float(match[2] or 1)))
        except ValueError:
            continue
    return found
