"""Text of slides: paragraphs with equations and raised text, and alternative forms of shapes."""

from __future__ import annotations

from typing import Any

from pptx.oxml.ns import qn

from data_pipeline.inputs.documents.html_content import raised
from data_pipeline.inputs.documents.office_math import tex_of

_MC = "{http://schemas.openxmlformats.org/markup-compatibility/2006}"
_EQUATION = "{http://schemas.microsoft.com/office/drawing/2010/main}m"
_SHAPES = ("p:sp", "p:pic", "p:graphicFrame", "p:grpSp", "p:cxnSp")
# Drawings of newer programs, for which the fallback has an image: new charts, ink, 3D models.
_NEWER = ("chartex", "contentPart", "model3d")


def choose_alternatives(slide: Any) -> int:
    """Replace every alternative of shapes on a slide by one that can be read: the newer form, or else its fallback.

    Returns the number of those that have no form that can be read.
    """
    unreadable = 0
    for alternative in list(slide.iter(f"{_MC}AlternateContent")):
        parent = alternative.getparent()
        if parent is None or parent.tag not in (qn("p:spTree"), qn("p:grpSp")):
            continue
        forms = [*alternative.findall(f"{_MC}Choice"), *alternative.findall(f"{_MC}Fallback")]
        readable = [form for form in forms if any(child.tag in map(qn, _SHAPES) for child in form)]
        known = [form for form in readable if not _is_newer(form)]
        place = parent.index(alternative)
        parent.remove(alternative)
        unreadable += not readable
        for child in reversed((known or readable or [()])[0]):
            parent.insert(place, child)
    return unreadable


def _is_newer(form: Any) -> bool:
    names = [str(element.tag) + str(element.get("uri", "")) for element in form.iter()]
    return any(name.endswith(newer) for name in names for newer in _NEWER)


def paragraph_text(paragraph: Any) -> str:
    r"""Return the text of a paragraph, equations as $TeX$, raised text as 10^6 and H_2O, a line break as \v."""
    text = ""
    baseline, script = 0, ""

    def ended() -> str:
        return raised(script.strip(), "^" if baseline > 0 else "_") if script.strip() else script

    for child in _children(paragraph):
        level = 0
        piece = ""
        if child.tag in (qn("a:r"), qn("a:fld")):
            properties = child.find(qn("a:rPr"))
            level = _sign(properties.get("baseline", "0")) if properties is not None else 0
            piece = child.findtext(qn("a:t")) or ""
        elif child.tag == qn("a:br"):
            piece = "\v"
        elif child.tag == _EQUATION:
            piece = f"${tex_of(child).strip()}$"
        else:
            continue
        if level != baseline:
            text += ended()
            script = ""
        baseline = level
        if level:
            script += piece
        else:
            text += piece
    return text + ended()


def _children(paragraph: Any) -> list[Any]:
    """Return the parts of a paragraph, those of an alternative in its newer form."""
    found = []
    for child in paragraph:
        if child.tag == f"{_MC}AlternateContent":
            choice = child.find(f"{_MC}Choice")
            found += list(choice) if choice is not None else []
        else:
            found.append(child)
    return found


def _sign(baseline: str) -> int:
    """Return 1 for a superscript, -1 for a subscript and 0 for other text."""
    value = baseline.rstrip("%")
    number = int(value) if value.lstrip("-").isdecimal() else 0
    return (number > 0) - (number < 0)
