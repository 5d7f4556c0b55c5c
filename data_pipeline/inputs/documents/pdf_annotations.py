"""Form fields, comments and stamps of a PDF page: those with text are drawn on the page, the others are counted."""

from __future__ import annotations

from collections import Counter

import pypdfium2 as pdfium
import pypdfium2.raw as pdfium_c

# What a viewer prints as a part of the page. A link has no content, and a pop-up belongs to a comment.
_DRAWN = {
    pdfium_c.FPDF_ANNOT_WIDGET: "form field",
    pdfium_c.FPDF_ANNOT_FREETEXT: "annotation: free text",
    pdfium_c.FPDF_ANNOT_STAMP: "annotation: stamp",
}
_COUNTED = {
    pdfium_c.FPDF_ANNOT_TEXT: "annotation: note",
    pdfium_c.FPDF_ANNOT_HIGHLIGHT: "annotation: highlight",
    pdfium_c.FPDF_ANNOT_UNDERLINE: "annotation: underline",
    pdfium_c.FPDF_ANNOT_SQUIGGLY: "annotation: underline",
    pdfium_c.FPDF_ANNOT_STRIKEOUT: "annotation: strikeout",
    pdfium_c.FPDF_ANNOT_INK: "annotation: drawing",
    pdfium_c.FPDF_ANNOT_LINE: "annotation: drawing",
    pdfium_c.FPDF_ANNOT_SQUARE: "annotation: drawing",
    pdfium_c.FPDF_ANNOT_CIRCLE: "annotation: drawing",
    pdfium_c.FPDF_ANNOT_POLYGON: "annotation: drawing",
    pdfium_c.FPDF_ANNOT_POLYLINE: "annotation: drawing",
    pdfium_c.FPDF_ANNOT_FILEATTACHMENT: "annotation: file",
    pdfium_c.FPDF_ANNOT_SOUND: "annotation: sound",
    pdfium_c.FPDF_ANNOT_MOVIE: "annotation: video",
    pdfium_c.FPDF_ANNOT_SCREEN: "annotation: video",
    pdfium_c.FPDF_ANNOT_RICHMEDIA: "annotation: video",
    pdfium_c.FPDF_ANNOT_THREED: "annotation: 3D model",
    pdfium_c.FPDF_ANNOT_REDACT: "annotation: redaction",
}
_APPEARANCE, _VALUE, _PARENT = b"AP", b"V", b"Parent"


def draw_annotations(document: pdfium.PdfDocument, number: int) -> tuple[pdfium.PdfPage, Counter[str]]:
    """Return a page with form fields, free text and stamps as parts of its content, and a count of the rest by name.

    The file is not changed. Fields and comments that have no appearance in the file are counted.

    Raises:
        PdfiumError: The page is damaged.
    """
    page = document[number]
    counts: Counter[str] = Counter()
    drawn = False
    others = []
    for index in range(pdfium_c.FPDFPage_GetAnnotCount(page)):
        annotation = pdfium_c.FPDFPage_GetAnnot(page, index)
        if not annotation:
            counts["annotation: damaged"] += 1
            continue
        kind = pdfium_c.FPDFAnnot_GetSubtype(annotation)
        if kind in _DRAWN and pdfium_c.FPDFAnnot_HasKey(annotation, _APPEARANCE):
            drawn = True
        elif kind == pdfium_c.FPDF_ANNOT_WIDGET:
            counts[_DRAWN[kind]] += any(pdfium_c.FPDFAnnot_HasKey(annotation, key) for key in (_VALUE, _PARENT))
        elif name := _DRAWN.get(kind) or _COUNTED.get(kind):
            counts[name] += 1
        if kind not in _DRAWN:
            others.append(annotation)
        else:
            pdfium_c.FPDFPage_CloseAnnot(annotation)
    for annotation in others:
        if drawn:
            flags = pdfium_c.FPDFAnnot_GetFlags(annotation)
            pdfium_c.FPDFAnnot_SetFlags(annotation, flags | pdfium_c.FPDF_ANNOT_FLAG_HIDDEN)
        pdfium_c.FPDFPage_CloseAnnot(annotation)
    if drawn and pdfium_c.FPDFPage_Flatten(page, pdfium_c.FLAT_NORMALDISPLAY) == pdfium_c.FLATTEN_SUCCESS:
        page.close()
        page = document[number]
    return page, counts
