"""One page of a PDF through pdfium: its text as pieces with their boxes, and its figures as pictures.

Figures are what drawings and embedded pictures cover together; text inside of them (labels of axes) is part of the
picture and not of the text. A picture that is stored as a JPEG and shown as it is keeps its bytes; everything else is
rendered. A page whose text runs up or down (a table set sideways) is turned so that its text stands upright.
"""

from __future__ import annotations

import ctypes
import io
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pypdfium2 as pdfium
import pypdfium2.raw as pdfium_c
from PIL import Image

from data_pipeline.inputs.documents.reading_order import SPLIT_GAP, Box, Piece, is_caption
from data_pipeline.inputs.draft import Media

MAX_RENDERED_PIXELS = 8_000_000
MIN_FIGURE = 60.0  # points: a smaller drawing is an ornament
MIN_PICTURE = 24.0  # points: a smaller picture is an icon
MIN_PICTURE_PIXELS = 28
NEAR = 6.0  # points between parts of one figure
NEAR_LABEL = 14.0  # points from a figure's side to the name of its axis
MAX_TEXT_SHARE = 0.3  # of a figure's area: with more, it is framed text or a table
_THIN = 2.5
_FIXED_FONT = re.compile(rb"mono|cour|consol|typewriter|menlo|inconsolata|cmtt|sftt|lmtt|fira.?code", re.IGNORECASE)
_FIXED_PITCH = 1  # a bit of a font descriptor's flags: PDF 32000-1, table 123
_LIGATURES = {
    **dict(zip("ﬀﬁﬂﬃﬄﬅﬆ", ("ff", "fi", "fl", "ffi", "ffl", "st", "st"), strict=True)),
    "\u00a0": " ",
    "\x02": "-",  # pdfium's marks of a hyphen at the end of a line
    "\ufffe": "-",
}


@dataclass(frozen=True)
class PageContent:
    """pieces: text and figures in no particular order (figures hold a Media); size: (width, height) in points."""

    pieces: list[Piece]
    size: tuple[float, float]


def read_page(page: pdfium.PdfPage, *, figures: bool, dpi: int) -> PageContent:
    """Text and, if asked for, figures of a page. dpi: at which drawings are rendered. Raises PdfiumError."""
    page.set_rotation(0)  # how it lies on a screen does not matter: the text says what is upright
    left, bottom, right, top = page.get_bbox()
    frame = _Frame(left, top, right - left, top - bottom)
    pieces, turned, turns = _text(page, frame)
    if figures:
        pieces = _with_figures(page, frame, turns, pieces, turned, dpi)
    return PageContent(pieces, frame.size(turns))


def render_page(page: pdfium.PdfPage, dpi: int) -> Image.Image:
    """The whole page as it is shown, RGB."""
    scale = min(dpi / 72, math.sqrt(MAX_RENDERED_PIXELS / (page.get_width() * page.get_height())))
    return page.render(scale=scale, draw_annots=False).to_pil().convert("RGB")


def encode_picture(picture: Image.Image, *, lossy: bool) -> Media:
    """lossy: for what was a photograph before; drawings and text keep every pixel."""
    buffer = io.BytesIO()
    if lossy:
        picture.save(buffer, "JPEG", quality=95)
    else:
        picture.save(buffer, "PNG")
    return Media("jpg" if lossy else "png", buffer.getvalue())


@dataclass(frozen=True)
class _Frame:
    """The visible part of a page in the coordinates of its file, where y grows upwards."""

    left: float
    top: float
    width: float
    height: float

    def size(self, turns: int) -> tuple[float, float]:
        """(width, height) after so many turns."""
        return (self.height, self.width) if turns % 2 else (self.width, self.height)

    def box(self, bounds: tuple[float, float, float, float], turns: int) -> Box:
        """(left, bottom, right, top) in the file -> a box from the upper left corner, after so many turns clockwise by
        90 degrees."""
        left, bottom, right, top = bounds
        box = Box(left - self.left, self.top - top, right - self.left, self.top - bottom)
        for turn in range(turns):
            height = self.width if turn % 2 else self.height
            box = Box(height - box.bottom, box.left, height - box.top, box.right)
        return box


# --- text -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Character:
    """box: left, bottom, right, top in the file's coordinates. turns: clockwise quarters that make it stand upright."""

    text: str
    box: tuple[float, float, float, float]
    size: float
    turns: int
    fixed: bool


def _text(page: pdfium.PdfPage, frame: _Frame) -> tuple[list[Piece], list[Box], int]:
    """The page's text in pieces, where text at another angle stands (names of axes, a stamp in the margin: it is no
    part of the text), and the clockwise turns that make the page's text stand upright."""
    textpage = page.get_textpage()
    characters = _characters(textpage)
    textpage.close()
    turns = Counter(c.turns for c in characters if c is not None).most_common(1)[0][0] if any(characters) else 0
    pieces: list[Piece] = []
    turned: list[Box] = []
    ended = True  # whether the next character begins a piece
    spaced = False
    for character in characters:
        if character is None:
            ended = True
        elif character.text == " ":
            spaced = True
        elif character.turns != turns:
            turned.append(frame.box(character.box, turns))
        else:
            box = frame.box(character.box, turns)
            text = _LIGATURES.get(character.text, character.text)
            if not ended and _follows(pieces[-1], box, character):
                last = pieces.pop()
                size = max(last.size, character.size)  # of a ligature's letters only the ink is known
                pieces.append(replace(last, box=last.box.union(box), text=last.text + " " * spaced + text, size=size))
            else:
                pieces.append(Piece(box, text, character.size, character.fixed))
            ended = spaced = False
    visible = Box(-1, -1, *frame.size(turns))
    return [piece for piece in pieces if visible.intersection(piece.box).area > 0], turned, turns


def _follows(piece: Piece, box: Box, character: _Character) -> bool:
    """Whether a character stands in the same line as the piece before it, no further than a wide space away."""
    em = max(piece.size, character.size)
    gap = box.left - piece.box.right
    return box.beside(piece.box) and -0.5 * em < gap < SPLIT_GAP * em and character.fixed == piece.fixed


def _characters(textpage: pdfium.PdfTextPage) -> list[_Character | None]:
    """Every character in the order of the file; None where a line ends."""
    found: list[_Character | None] = []
    rect, flags = pdfium_c.FS_RECTF(), ctypes.c_int()
    name = ctypes.create_string_buffer(128)
    fonts: dict[tuple[bytes, int], bool] = {}
    raw = textpage.raw
    for index in range(textpage.count_chars()):
        code = pdfium_c.FPDFText_GetUnicode(raw, index)
        if code in (10, 13):
            found.append(None)
            continue
        if code in (9, 32, 0xA0):
            found.append(_Character(" ", (0, 0, 0, 0), 0, found[-1].turns if found and found[-1] else 0, False))
            continue
        if (code < 32 and code != 2) or 0xD800 <= code < 0xE000 or code > 0x10FFFF:
            continue
        box = _character_box(raw, index, rect)
        if box is None:
            continue
        pdfium_c.FPDFText_GetFontInfo(raw, index, name, len(name), flags)
        font = (name.value, flags.value)
        if font not in fonts:
            fonts[font] = bool(flags.value & _FIXED_PITCH) or _FIXED_FONT.search(name.value) is not None
        # pdfium counts angles clockwise.
        angle = pdfium_c.FPDFText_GetCharAngle(raw, index)
        turns = -round(angle / (math.pi / 2)) % 4 if angle >= 0 else 0
        size = box[2] - box[0] if turns % 2 else box[3] - box[1]
        found.append(_Character(chr(code), box, size, turns, fonts[font]))
    return found


def _character_box(
    textpage: pdfium_c.FPDF_TEXTPAGE, index: int, rect: pdfium_c.FS_RECTF
) -> tuple[float, float, float, float] | None:
    """From the font's ascent to its descent, or around the ink where the font says nothing of them."""
    if pdfium_c.FPDFText_GetLooseCharBox(textpage, index, rect) and rect.right > rect.left and rect.top > rect.bottom:
        return rect.left, rect.bottom, rect.right, rect.top
    left, right, bottom, top = (ctypes.c_double() for _ in range(4))
    if not pdfium_c.FPDFText_GetCharBox(textpage, index, left, right, bottom, top):
        return None
    return (left.value, bottom.value, right.value, top.value) if right.value > left.value else None


# --- figures ----------------------------------------------------------------------------------------------------------


@dataclass
class _Part:
    """Something drawn. picture: the object, if it is an embedded picture; curved: more than a frame or a rule."""

    box: Box
    picture: pdfium.PdfImage | None = None
    curved: bool = False


@dataclass
class _Cluster:
    box: Box
    parts: list[_Part]


def _with_figures(
    page: pdfium.PdfPage, frame: _Frame, turns: int, text: list[Piece], turned: list[Box], dpi: int
) -> list[Piece]:
    figures: list[Piece] = []
    visible = Box(0, 0, *frame.size(turns))
    for cluster in _clusters(_parts(page, frame, turns), visible):
        if _is_figure(cluster, text):
            cluster, text = _with_labels(cluster, text, turned)
            media = _media(page, frame, turns, cluster, dpi)
            if media is not None:
                figures.append(Piece(cluster.box, figure=media))
    return [*text, *figures]


def _parts(page: pdfium.PdfPage, frame: _Frame, turns: int) -> list[_Part]:
    parts = []
    kinds = [pdfium_c.FPDF_PAGEOBJ_IMAGE, pdfium_c.FPDF_PAGEOBJ_PATH, pdfium_c.FPDF_PAGEOBJ_SHADING]
    visible = Box(0, 0, *frame.size(turns))
    for item in page.get_objects(filter=kinds):
        bounds = item.get_bounds()
        outer = item.container
        while outer is not None:
            bounds = outer.get_matrix().on_rect(*bounds)
            outer = outer.container
        box = frame.box(bounds, turns).intersection(visible)
        is_picture = isinstance(item, pdfium.PdfImage)
        if box.width < 0 or box.height < 0:  # outside of the page; a rule may have no height
            continue
        if is_picture:
            if min(box.width, box.height) >= MIN_PICTURE and min(item.get_px_size()) >= MIN_PICTURE_PIXELS:
                parts.append(_Part(box, picture=item))
        elif box.area < 0.6 * visible.area and _is_drawn(item):
            parts.append(_Part(box, curved=_is_curved(item)))
    return parts


def _is_drawn(path: pdfium.PdfObject) -> bool:
    if path.type != pdfium_c.FPDF_PAGEOBJ_PATH:
        return True
    fill, stroke = ctypes.c_int(), ctypes.c_int()
    pdfium_c.FPDFPath_GetDrawMode(path, fill, stroke)
    return bool(fill.value or stroke.value)


def _is_curved(path: pdfium.PdfObject) -> bool:
    """More than a rectangle or a rule."""
    if path.type != pdfium_c.FPDF_PAGEOBJ_PATH:
        return True
    count = pdfium_c.FPDFPath_CountSegments(path)
    segments = (pdfium_c.FPDFPath_GetPathSegment(path, index) for index in range(min(count, 12)))
    return count > 12 or any(
        pdfium_c.FPDFPathSegment_GetType(segment) == pdfium_c.FPDF_SEGMENT_BEZIERTO for segment in segments
    )


def _clusters(parts: Sequence[_Part], page: Box) -> list[_Cluster]:
    """Parts that touch or nearly touch. Rules do not connect: the line below a page's head is no part of a figure."""
    clusters: list[_Cluster] = []
    rules = [part for part in parts if part.picture is None and min(part.box.width, part.box.height) < _THIN]
    alone = {id(part) for part in rules}
    for part in parts:
        if id(part) in alone:
            continue
        merged = _Cluster(part.box, [part])
        while touching := [c for c in clusters if _overlaps(merged.box.grown(NEAR), c.box)]:
            for cluster in touching:
                clusters.remove(cluster)
                merged = _Cluster(merged.box.union(cluster.box), cluster.parts + merged.parts)
        clusters.append(merged)
    for rule in rules:
        for cluster in clusters:
            shared = cluster.box.grown(NEAR).intersection(rule.box.grown(0.1))
            if shared.width > 0 and shared.height > 0 and shared.area > 0.5 * rule.box.grown(0.1).area:
                cluster.box = cluster.box.union(rule.box)
                cluster.parts.append(rule)
    return [
        replace(cluster, box=cluster.box.intersection(page))
        for cluster in clusters
        if cluster.box.area < 0.9 * page.area
    ]


def _is_figure(cluster: _Cluster, text: Sequence[Piece]) -> bool:
    if any(part.picture is not None for part in cluster.parts):
        return True
    if min(cluster.box.width, cluster.box.height) < MIN_FIGURE:
        return False
    covered = sum(cluster.box.intersection(piece.box).area for piece in text if _overlaps(cluster.box, piece.box))
    if covered > MAX_TEXT_SHARE * cluster.box.area:
        return False
    filled = sum(min(part.box.width, part.box.height) >= _THIN for part in cluster.parts)
    return any(part.curved for part in cluster.parts) or filled >= 4


def _overlaps(first: Box, second: Box) -> bool:
    shared = first.intersection(second)
    return shared.width > 0 and shared.height > 0


def _with_labels(cluster: _Cluster, text: list[Piece], turned: list[Box]) -> tuple[_Cluster, list[Piece]]:
    """The cluster with the short pieces of text in it and just beside it, and the text without them."""
    box = cluster.box
    outside, turned = list(text), list(turned)
    while True:
        near = box.grown(NEAR)
        beside = Box(box.left - NEAR_LABEL, box.top, box.right + NEAR_LABEL, box.bottom)
        labels = [
            piece
            for piece in outside
            if not is_caption(piece.text)
            and (
                near.intersection(piece.box).area > 0.5 * piece.box.area
                or (_overlaps(near, piece.box) and piece.box.width < 0.4 * box.width and len(piece.text) < 30)
                or (_overlaps(beside, piece.box) and len(piece.text) <= 6)
            )
        ]
        names = [name for name in turned if _overlaps(beside, name)]
        if not labels and not names:
            return replace(cluster, box=box), outside
        for found in (*names, *(piece.box for piece in labels)):
            box = box.union(found)
        outside = [piece for piece in outside if piece not in labels]
        turned = [name for name in turned if name not in names]


def _media(page: pdfium.PdfPage, frame: _Frame, turns: int, cluster: _Cluster, dpi: int) -> Media | None:
    pictures = [part.picture for part in cluster.parts if part.picture is not None]
    scale = dpi / 72
    for part in cluster.parts:
        if part.picture is not None:  # no pixel of a picture is lost
            scale = max(scale, min(max(part.picture.get_px_size()) / max(part.box.width, part.box.height), 600 / 72))
    scale = min(scale, math.sqrt(MAX_RENDERED_PIXELS / max(cluster.box.area, 1.0)))
    lossy = any("DCTDecode" in picture.get_filters() for picture in pictures)
    alone = len(cluster.parts) == len(pictures) == 1
    margin = 0 if alone else 1  # the lines of a drawing are wider than their places
    box = cluster.box.grown(margin).intersection(Box(0, 0, *frame.size(turns)))
    rendered = _rendered(page, frame, turns, box, scale)
    if min(rendered.size) < MIN_PICTURE_PIXELS:
        return None
    if alone and lossy:
        stored = bytes(pictures[0].get_data(decode_simple=True))
        if _looks_like(stored, rendered):
            return Media("jpg", stored)
    return encode_picture(rendered, lossy=lossy)


def _rendered(page: pdfium.PdfPage, frame: _Frame, turns: int, box: Box, scale: float) -> Image.Image:
    width, height = frame.size(turns)
    for _ in range(turns):  # back to how the page lies in the file, one turn counter-clockwise each
        box = Box(box.top, width - box.right, box.bottom, width - box.left)
        width, height = height, width
    margins = (box.left, height - box.bottom, width - box.right, box.top)
    crop = tuple(max(math.floor(margin * scale) / scale - 1e-6, 0.0) for margin in margins)
    picture = page.render(scale=scale, crop=crop, draw_annots=False).to_pil().convert("RGB")
    return picture.rotate(-90 * turns, expand=True) if turns else picture


def _looks_like(stored: bytes, rendered: Image.Image) -> bool:
    """Whether a stored JPEG shows what the page shows: not flipped, masked, clipped, inverted or drawn over."""
    try:
        picture = Image.open(io.BytesIO(stored))
        if picture.mode not in ("RGB", "L"):
            return False
        small = [
            np.asarray(p.convert("RGB").resize((32, 32), Image.Resampling.BOX), np.int16) for p in (picture, rendered)
        ]
    except Exception:  # a damaged stream: the page's renderer has the last word
        return False
    return float(np.abs(small[0] - small[1]).mean()) < 4.0
