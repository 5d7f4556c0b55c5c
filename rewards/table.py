"""Every verifier, by name."""

from __future__ import annotations

from collections.abc import Mapping

from common.nearest import suggestion
from rewards.verdict import RewardError
from rewards.verifier import Verifier
from rewards.verifiers.chart import Chart
from rewards.verifiers.chemistry import Chemistry
from rewards.verifiers.code import Code
from rewards.verifiers.counting import Counting
from rewards.verifiers.exact import Exact
from rewards.verifiers.geoguess import Geoguess
from rewards.verifiers.grounding import Grounding
from rewards.verifiers.gui_desktop import GuiDesktop
from rewards.verifiers.gui_mobile import GuiMobile
from rewards.verifiers.gui_web import GuiWeb
from rewards.verifiers.instruction import Instruction
from rewards.verifiers.mathematics import Mathematics
from rewards.verifiers.ocr import Ocr
from rewards.verifiers.physics import Physics
from rewards.verifiers.text import NAMES, Text
from rewards.verifiers.video import Video

_ALL: tuple[Verifier, ...] = (
    Exact(),
    Mathematics(),
    Physics(),
    Chemistry(),
    Chart(),
    Counting(),
    Ocr(),
    *(Text(name) for name in NAMES),
    Video(),
    Grounding(),
    Geoguess(),
    GuiMobile(),
    GuiDesktop(),
    GuiWeb(),
    Code(),
    Instruction(),
)
VERIFIERS: Mapping[str, Verifier] = {verifier.name: verifier for verifier in _ALL}


def verifier_named(name: str) -> Verifier:
    """Return a verifier.

    Raises:
        RewardError: There is none of this name. The message has the nearest one.
    """
    if name not in VERIFIERS:
        hint = suggestion(name, VERIFIERS) or f": the verifiers are {', '.join(VERIFIERS)}"
        raise RewardError(f"there is no verifier {name!r}{hint}")
    return VERIFIERS[name]
