r"""Screenshots of local web pages with the boxes of their visible elements.

A real Chromium shows every page at each viewport (see browser.py). Each screenshot becomes one sample of each form:

    chat    [{"role": "user", "content": "<image>\nWhere is the button \"Save\"?"},
             {"role": "assistant", "content": "<|begin_of_box|>[[80,50,180,95]]<|end_of_box|>"}, ...]
    list    {"domain": "grounding", "text": "<image>button \"Save\" [[80,50,180,95]]\ntext \"Ready\" [[...]]"}

A chat asks about up to `questions` elements, chosen at random among those whose role and name are unique on the page;
most are asked for by name, some by box. Needs the extra `gui` and a Chromium.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.draft import Draft, Media, Rejected, Unit, credited
from data_pipeline.inputs.grounding.browser import Chromium
from data_pipeline.inputs.grounding.screen import Element, Screen, Viewport
from data_pipeline.inputs.names import files_below
from data_pipeline.media.boxes import Thousandths, checked_box, to_thousandths, write_boxes

SUFFIXES = (".html", ".htm", ".xhtml")
VIEWPORTS = {
    "desktop": Viewport(1280, 800),
    "wide": Viewport(1920, 1080),
    "tablet": Viewport(820, 1180, mobile=True),
    "phone": Viewport(390, 844, mobile=True),
}
MAX_NAME_LENGTH = 80  # characters; a longer text is content, not the name of an element
SCREENSHOT_BYTES = 150_000  # typical size

WHERE = ("Where is the {}?", "Locate the {}.", "Give the bounding box of the {}.", "Find the {} on the screen.")
WHAT = ("What is at {}?", "Which element is in the box {}?")


@dataclass(frozen=True)
class Gui:
    """Local HTML pages. A unit is one page. A page may load files of the folder given, or of its own folder."""

    paths: tuple[str, ...]  # folders of pages, pages, and lists (*.txt) of paths or file: URLs, one per line
    viewports: tuple[str, ...] = ("desktop", "phone")  # names of VIEWPORTS
    form: Literal["both", "chat", "list"] = "both"  # of samples, see above
    questions: int = 8  # most questions of a chat
    seed: int = 0  # of the choice of questions
    java_script: bool = True  # run the scripts of pages
    time_limit: float = 20.0  # seconds per page and viewport
    chromium: str = ""  # the browser's program; empty: the first that is found

    def __post_init__(self) -> None:
        """Check the options."""
        if unknown := [name for name in self.viewports if name not in VIEWPORTS]:
            raise DataError(f"--set viewports={unknown[0]}: use {', '.join(VIEWPORTS)}")
        if not self.viewports or len(set(self.viewports)) < len(self.viewports):
            raise DataError(
                f"--set viewports={','.join(self.viewports)}: name one or more of {', '.join(VIEWPORTS)}, each once"
            )
        if self.questions < 1 or not 0 < self.time_limit < math.inf:
            raise DataError("--set questions and --set time_limit: give positive numbers")

    def units(self) -> Sequence[Unit]:
        """Return one unit per page; `extra["input"]` is the index of its path in `paths`."""
        size = SCREENSHOT_BYTES * len(self.viewports) * (2 if self.form == "both" else 1)
        units = [
            Unit(str(page), bytes=size, extra={"input": number})
            for number, path in enumerate(self.paths)
            for page in _pages(Path(path))
        ]
        if not units:
            raise DataError(f"no pages ({', '.join(SUFFIXES)}) in {', '.join(self.paths)}")
        return units

    def given(self, unit: Unit) -> Mapping[str, int]:
        """Count the screenshots."""
        return {"screenshots": len(self.viewports)}

    def read(self, unit: Unit) -> Iterator[Draft | Rejected]:
        """Yield the samples of a page, viewport by viewport."""
        page, given = Path(unit.path), Path(self.paths[unit.extra["input"]])
        root = given if given.is_dir() else page.parent
        browser = _browser(self.chromium, self.java_script, self.time_limit)
        for name in self.viewports:
            origin = f"{page.relative_to(root)}@{name}"
            try:
                if not page.is_file():
                    raise BadSample("missing_file", f"{page} does not exist")
                screen = browser.screenshot(page, root, VIEWPORTS[name])
                yield from credited(self._samples(origin, screen, VIEWPORTS[name]), {"screenshots": 1})
            except BadSample as error:
                yield Rejected(origin, error.reason, error.detail, {"screenshots": 1})

    def _samples(self, origin: str, screen: Screen, viewport: Viewport) -> Iterator[Draft]:
        unnamed: Counter[str] = Counter()
        described = list(_described(screen.elements, viewport, unnamed))
        if not described:
            raise BadSample("no_boxes", "no element with a name is visible on the page")
        image = Media("png", screen.png)
        extra: dict[str, Any] = {"page": origin}
        messages = self._chat(origin, described)
        if self.form == "chat" and not messages:
            raise BadSample("no_boxes", "no element of the page has a name of its own to ask for")
        if self.form in ("both", "chat") and messages:
            not_read = unnamed if self.form == "chat" else {}
            yield Draft({"domain": "chat", "messages": messages, **extra}, [image], origin=origin, not_read=not_read)
        if self.form in ("both", "list"):
            lines = "\n".join(f"{description} {write_boxes([box])}" for description, box in described)
            record = {"domain": "grounding", "text": f"<image>{lines}", **extra}
            yield Draft(record, [image], origin=origin, not_read=unnamed)

    def _chat(self, origin: str, described: Sequence[tuple[str, Thousandths]]) -> list[dict[str, str]]:
        rng = random.Random(f"{self.seed}:{origin}")
        names = Counter(description.casefold() for description, _ in described)
        boxes = Counter(box for _, box in described)
        unique = [(name, box) for name, box in described if names[name.casefold()] == 1 and boxes[box] == 1]
        turns: list[dict[str, str]] = []
        for description, box in rng.sample(unique, min(self.questions, len(unique))):
            written = write_boxes([box])
            if rng.random() < 0.75:
                question, answer = rng.choice(WHERE).format(description), f"<|begin_of_box|>{written}<|end_of_box|>"
            else:
                question, answer = rng.choice(WHAT).format(written), f"The {description}."
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if turns:
            turns[0]["content"] = f"<image>\n{turns[0]['content']}"
        return turns


def _described(
    elements: Sequence[Element], viewport: Viewport, unnamed: Counter[str]
) -> Iterator[tuple[str, Thousandths]]:
    """Yield ('button "Save"', its box) for the elements that a sample can name, and count the others by reason.

    Names with a "<" are not used: they could be taken for a placeholder or a special token.
    """
    for element in elements:
        if len(element.name) > MAX_NAME_LENGTH:
            unnamed["element: name too long"] += 1
        elif "<" in element.name:
            unnamed["element: name with <"] += 1
        else:
            try:
                box = checked_box(element.box, viewport.width, viewport.height)
                yield f'{element.role} "{element.name}"', to_thousandths(box, viewport.width, viewport.height)
            except BadSample:
                unnamed["element: thinner than a thousandth of the screen"] += 1


def _pages(path: Path) -> list[Path]:
    """Return the pages that a path stands for."""
    if path.is_dir():
        return sorted(page for page in files_below(path) if page.suffix.lower() in SUFFIXES)
    if path.suffix.lower() in SUFFIXES:
        return [path]
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}): give pages, a folder, or a list of pages") from error
    return [path.parent / _local_path(line, path) for line in filter(None, map(str.strip, lines))]


def _local_path(line: str, path: Path) -> str:
    """Return the path that a line of a list stands for: a path or a file: URL."""
    try:
        url = urlsplit(line)
    except ValueError as error:
        raise DataError(f"{path}: {line} is not a path or URL ({error}): give the path of a page") from error
    if url.scheme not in ("", "file") or url.netloc:
        raise DataError(f"{path}: {line} is not a local page: only local files are supported")
    return unquote(url.path) if url.scheme == "file" else line


@lru_cache(maxsize=1)
def _browser(executable: str, java_script: bool, time_limit: float) -> Chromium:
    """Return the browser of this process. Starting one takes longer than showing a page."""
    browser = Chromium(executable, java_script=java_script, time_limit=time_limit)
    Finalize(None, browser.close, exitpriority=10)  # unlike atexit, also at the end of worker processes
    return browser
