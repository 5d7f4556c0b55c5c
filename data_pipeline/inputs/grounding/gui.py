"""Screenshots of local web pages with the boxes of what can be seen and used on them.

Every page is photographed by a real Chromium at each viewport (see browser.py) and becomes one sample of each form:

    chat    [{"role": "user", "content": "<image>\\nWhere is the button \\"Save\\"?"},
             {"role": "assistant", "content": "<|begin_of_box|>[[80,50,180,95]]<|end_of_box|>"}, ...]
    list    {"domain": "grounding", "text": "<image>button \\"Save\\" [[80,50,180,95]]\\ntext \\"Ready\\" [[...]]"}

A chat asks about up to `questions` elements, drawn by lot from those whose role and name stand for one element only;
most are asked for by name, some by box. Needs the extra `gui` and a Chromium.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.draft import Draft, Media, Rejected, Unit
from data_pipeline.inputs.grounding.browser import Chromium, Element, Screen, Viewport
from data_pipeline.inputs.names import files_below
from data_pipeline.media.boxes import Thousandths, checked_box, to_thousandths, write_boxes

SUFFIXES = (".html", ".htm", ".xhtml")
VIEWPORTS = {
    "desktop": Viewport(1280, 800),
    "wide": Viewport(1920, 1080),
    "tablet": Viewport(820, 1180, mobile=True),
    "phone": Viewport(390, 844, mobile=True),
}
LONGEST_NAME = 80  # letters; longer text is content, not what an element is called by
SCREENSHOT_BYTES = 150_000  # roughly

WHERE = ("Where is the {}?", "Locate the {}.", "Give the bounding box of the {}.", "Find the {} on the screen.")
WHAT = ("What is at {}?", "Which element is in the box {}?")


@dataclass(frozen=True)
class Gui:
    """Local HTML pages: folders of them, pages, and lists (*.txt) of paths or file: URLs, one a line.

    A page may load files of the folder given, or of its own folder. viewports: names of VIEWPORTS. java_script:
    whether the pages' scripts run. time_limit: seconds a page and viewport. chromium: the browser's program.
    """

    paths: tuple[str, ...]
    viewports: tuple[str, ...] = ("desktop", "phone")
    form: Literal["both", "chat", "list"] = "both"
    questions: int = 8
    seed: int = 0
    java_script: bool = True
    time_limit: float = 20.0
    chromium: str = ""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.viewports if name not in VIEWPORTS]:
            raise DataError(f"--set viewports={unknown[0]}: use {', '.join(VIEWPORTS)}")
        if not self.viewports:
            raise DataError(f"--set viewports=: name one or more of {', '.join(VIEWPORTS)}")
        if self.questions < 1 or not 0 < self.time_limit < math.inf:
            raise DataError("--set questions and --set time_limit: give positive numbers")

    def units(self) -> Sequence[Unit]:
        size = SCREENSHOT_BYTES * len(self.viewports) * (2 if self.form == "both" else 1)
        units = [
            Unit(str(page), bytes=size, extra={"input": number})
            for number, path in enumerate(self.paths)
            for page in _pages(Path(path))
        ]
        if not units:
            raise DataError(f"no pages ({', '.join(SUFFIXES)}) in {', '.join(self.paths)}")
        return units

    def read(self, unit: Unit) -> Iterator[Draft | Rejected]:
        page, given = Path(unit.path), Path(self.paths[unit.extra["input"]])
        root = given if given.is_dir() else page.parent
        browser = _browser(self.chromium, self.java_script, self.time_limit)
        for name in self.viewports:
            where = f"{page.relative_to(root)}@{name}"
            try:
                if not page.is_file():
                    raise BadSample("missing_file", f"{page} does not exist")
                yield from self._samples(where, browser.photograph(page, root, VIEWPORTS[name]), VIEWPORTS[name])
            except BadSample as error:
                yield Rejected(where, error.reason, error.detail)

    def _samples(self, origin: str, screen: Screen, viewport: Viewport) -> Iterator[Draft]:
        found = list(_boxed(screen.elements, viewport))
        if not found:
            raise BadSample("no_boxes", "nothing with a name is seen on the page")
        picture = Media("png", screen.png)
        known: dict[str, Any] = {"page": origin}
        if self.form in ("both", "chat") and (messages := self._chat(origin, found)):
            yield Draft({"domain": "chat", "messages": messages, **known}, [picture], origin=origin)
        if self.form in ("both", "list"):
            lines = "\n".join(f"{said} {write_boxes([box])}" for said, box in found)
            yield Draft({"domain": "grounding", "text": f"<image>{lines}", **known}, [picture], origin=origin)

    def _chat(self, origin: str, found: Sequence[tuple[str, Thousandths]]) -> list[dict[str, str]]:
        lot = random.Random(f"{self.seed}:{origin}")
        times, boxes = Counter(said.casefold() for said, _ in found), Counter(box for _, box in found)
        single = [(said, box) for said, box in found if times[said.casefold()] == 1 and boxes[box] == 1]
        turns: list[dict[str, str]] = []
        for said, box in lot.sample(single, min(self.questions, len(single))):
            written = write_boxes([box])
            if lot.random() < 0.75:
                question, answer = lot.choice(WHERE).format(said), f"<|begin_of_box|>{written}<|end_of_box|>"
            else:
                question, answer = lot.choice(WHAT).format(written), f"The {said}."
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if turns:
            turns[0]["content"] = f"<image>\n{turns[0]['content']}"
        return turns


def _boxed(elements: Sequence[Element], viewport: Viewport) -> Iterator[tuple[str, Thousandths]]:
    """('button "Save"', its box) of the elements that can be spoken of. Names that hold a placeholder or a tag would
    be taken for one."""
    for element in elements:
        if len(element.name) > LONGEST_NAME or "<" in element.name:
            continue
        try:
            box = checked_box(element.box, viewport.width, viewport.height)
            yield f'{element.role} "{element.name}"', to_thousandths(box, viewport.width, viewport.height)
        except BadSample:  # thinner than a thousandth of the screen
            continue


def _pages(path: Path) -> list[Path]:
    """The pages that a path stands for."""
    if path.is_dir():
        return sorted(page for page in files_below(path) if page.suffix.lower() in SUFFIXES)
    if path.suffix.lower() in SUFFIXES:
        return [path]
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}): give pages, a folder, or a list of pages") from error
    return [path.parent / _local(line, path) for line in filter(None, map(str.strip, lines))]


def _local(line: str, path: Path) -> str:
    url = urlsplit(line)
    if url.scheme not in ("", "file") or url.netloc:
        raise DataError(f"{path}: {line} is not a local page: only files are photographed")
    return unquote(url.path) if url.scheme == "file" else line


@lru_cache(maxsize=1)
def _browser(executable: str, java_script: bool, time_limit: float) -> Chromium:
    """This process's browser: starting one takes longer than a page does."""
    browser = Chromium(executable, java_script=java_script, time_limit=time_limit)
    Finalize(None, browser.close, exitpriority=10)  # unlike atexit, at the end of worker processes too
    return browser
