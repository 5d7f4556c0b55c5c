"""gui_desktop: OSWorld's actions, calls such as `left_click(start_box='[500,500]', element_info='OK')`.

The action must be the same; `element_info` does not count. Then, with d the distance of two points in thousandths and
near(d) = 1 - 0.2 d / 20 up to 20, above it max(0, 1 - d / 50):

    left_click, right_click, middle_click, left_double_click, hover    near(d)
    left_drag        root of near(start) * near(end)
    scroll           near(d) * max(0, 1 - |steps - wanted| / (2 wanted)); the same direction. An answer without steps
                     means 5; a reference without steps takes any
    type             0.6 * edit similarity + 0.4 * shared pairs of letters, without case; 0 for no text in one of them
    key, hotkey      1 for the same keys, without case and space, else 0
    WAIT, DONE, FAIL, wait, finished    1

GLM-V's published code also multiplies the score of a text by 0.3 if it is repetitive, which gives 0.3 for an equal text
such as "aaaaaaaaaa", and once more by the ratio of lengths below 0.3, which the edits have paid for. We do neither.

Reasons: no_call, action, arguments, equal, distance, scroll, type, key.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from common.nearest import suggestion
from rewards.calls import Call, read_call
from rewards.plain_text import composed
from rewards.similarity import edit_similarity, shared_bigrams
from rewards.verdict import Item, Outcome, RewardError, Verdict
from rewards.verifier import check_settings

Arguments: TypeAlias = dict[str, Any]

LARGEST = 1000
DEFAULT_STEPS = 5  # of an answer without
ANY_STEPS = -1  # of a reference without
OPTIONAL = {"element_info"}
_POINT = re.compile(r"\s*\[\s*(\d{1,4})\s*,\s*(\d{1,4})\s*\]\s*")


class GuiDesktop:
    """An action with mouse and keyboard."""

    name = "gui_desktop"
    settings: Mapping[str, Any] = {}

    def check(self, item: Item) -> None:
        check_settings(self, item)
        call = read_call(item.reference.strip())
        if call is None:
            raise RewardError(
                f"gui_desktop: the reference {item.reference[:100]!r} is not a call such as key(keys='enter')"
            )
        if call.name not in ACTIONS:
            hint = suggestion(call.name, ACTIONS) or f": the actions are {', '.join(ACTIONS)}"
            raise RewardError(f"gui_desktop: there is no action {call.name!r}{hint}")
        if _arguments(call) is None:
            raise RewardError(
                f"gui_desktop: the reference {item.reference[:100]!r} has wrong arguments for {call.name}"
            )

    def score(self, answer: str, item: Item) -> Outcome:
        wanted, given = (read_call(text.strip()) for text in (item.reference, answer))
        if given is None or wanted is None:
            return Verdict(0.0, "no_call")
        if given.name != wanted.name:
            return Verdict(0.0, "action")
        arguments, targets = _arguments(given), _arguments(wanted, steps=ANY_STEPS)
        if arguments is None or targets is None:
            return Verdict(0.0, "arguments")
        reason, compare = SCORES[ACTIONS[given.name]]
        return Verdict(1.0, "equal") if arguments == targets else Verdict(compare(arguments, targets), reason)


def near(a: tuple[int, int], b: tuple[int, int]) -> float:
    """Return how well a point is hit, from the distance in thousandths."""
    distance = math.dist(a, b)
    return 1 - 0.2 * distance / 20 if distance <= 20 else max(0.0, 1 - distance / 50)


def _point(given: Arguments, wanted: Arguments) -> float:
    return near(given["start_box"], wanted["start_box"])


def _drag(given: Arguments, wanted: Arguments) -> float:
    return math.sqrt(_point(given, wanted) * near(given["end_box"], wanted["end_box"]))


def _scroll(given: Arguments, wanted: Arguments) -> float:
    if given["direction"] != wanted["direction"]:
        return 0.0
    steps, target = given["step"], wanted["step"]
    if target == ANY_STEPS:
        return _point(given, wanted)
    same = 1 - abs(steps - target) / (2 * target) if target else float(steps == target)
    return _point(given, wanted) * max(0.0, same)


def _type(given: Arguments, wanted: Arguments) -> float:
    a, b = (composed(arguments["content"]).strip().lower() for arguments in (given, wanted))
    return 0.6 * edit_similarity(a, b) + 0.4 * shared_bigrams(a, b) if a and b else 0.0


def _key(given: Arguments, wanted: Arguments) -> float:
    return float(given["keys"] == wanted["keys"])


# --- arguments of an action, and how two are compared -----------------------------------------------------------------


def _read_point(value: str | int) -> tuple[int, int] | None:
    found = _POINT.fullmatch(value) if isinstance(value, str) else None
    point = (int(found[1]), int(found[2])) if found else None
    return point if point and max(point) <= LARGEST else None


def _read_keys(value: str | int) -> str | None:
    return re.sub(r"\s*\+\s*", "+", value.strip().casefold()) or None if isinstance(value, str) else None


READERS: Mapping[str, Callable[[str | int], Any]] = {
    "start_box": _read_point,
    "end_box": _read_point,
    "direction": lambda value: value if value in ("up", "down", "left", "right") else None,
    "step": lambda value: int(value) if re.fullmatch(r"\d{1,9}", str(value)) else None,
    "content": lambda value: value if isinstance(value, str) else None,
    "keys": _read_keys,
}
# kind -> the reason, the score, and the names of its arguments
SCORES: Mapping[str, tuple[str, Callable[[Arguments, Arguments], float]]] = {
    "point": ("distance", _point),
    "drag": ("distance", _drag),
    "scroll": ("scroll", _scroll),
    "type": ("type", _type),
    "key": ("key", _key),
    "end": ("equal", lambda given, wanted: 1.0),
}
REQUIRED: Mapping[str, tuple[str, ...]] = {
    "point": ("start_box",),
    "drag": ("start_box", "end_box"),
    "scroll": ("start_box", "direction", "step"),
    "type": ("content",),
    "key": ("keys",),
    "end": (),
}
ACTIONS: Mapping[str, str] = {
    **dict.fromkeys(("left_click", "right_click", "middle_click", "left_double_click", "hover"), "point"),
    "left_drag": "drag",
    "scroll": "scroll",
    "type": "type",
    **dict.fromkeys(("key", "hotkey"), "key"),
    **dict.fromkeys(("WAIT", "DONE", "FAIL", "wait", "finished"), "end"),
}


def _arguments(call: Call, steps: int = DEFAULT_STEPS) -> Arguments | None:
    """Return the arguments that count, read; None if one is missing, unknown or cannot be read.

    Args:
        call: The call.
        steps: Of a scroll that names none.
    """
    given = {name: value for name, value in call.arguments.items() if name not in OPTIONAL}
    required = REQUIRED[ACTIONS[call.name]]
    open_steps = ACTIONS[call.name] == "scroll" and "step" not in given
    if given.keys() != set(required) - ({"step"} if open_steps else set()):
        return None
    read = {name: READERS[name](value) for name, value in given.items()}
    if open_steps:
        read["step"] = steps
    return None if None in read.values() else read
