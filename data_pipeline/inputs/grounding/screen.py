"""Screenshots of web pages: the viewport, the image, and the visible elements with their boxes."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.media.boxes import Box

# Role in Chromium's accessibility tree -> role in samples.
ROLES = {
    # elements that a user can operate
    "button": "button",
    "link": "link",
    "checkbox": "checkbox",
    "tab": "tab",
    "switch": "switch",
    "slider": "slider",
    "searchbox": "searchbox",
    "option": "option",
    "textbox": "text field",
    "combobox": "drop-down list",
    "radio": "radio button",
    "menuitem": "menu item",
    "spinbutton": "number field",
    "PopUpButton": "drop-down list",
    "ComboBoxSelect": "drop-down list",
    "ComboBoxMenuButton": "drop-down list",
    "DisclosureTriangle": "disclosure triangle",
    # elements that a user can read
    "heading": "heading",
    "image": "image",
    "img": "image",
    "StaticText": "text",
}


@dataclass(frozen=True)
class Viewport:
    """Size and kind of the screen that a page is shown on."""

    width: int  # pixels
    height: int  # pixels
    mobile: bool = False  # a touch screen whose browser honours the page's viewport tag


@dataclass(frozen=True)
class Element:
    """One visible element of a page."""

    role: str  # a value of ROLES
    name: str  # its accessible name
    box: Box  # its visible part, in pixels of the screenshot


@dataclass(frozen=True)
class Screen:
    """What a viewport shows of a page."""

    png: bytes  # the screenshot
    elements: tuple[Element, ...]  # in document order
