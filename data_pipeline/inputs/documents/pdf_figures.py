"""The figures of a PDF page, as images.

A figure is the area that drawings and embedded images cover together. Text inside it (axis labels) belongs to the
image, not to the text. An image that is stored as a JPEG and shown unchanged keeps its bytes; everything else is
rendered.
"""

from __future__ import annotations

import ctypes
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pypdfium2 as pdfium
import pypdfium2.raw as pdfium_c
from PIL import Image

from data_pipeline.inputs.documents.page_geometry import PageFrame, Rect
from data_pipeline.inputs.documents.reading_order import PageItem, is_caption
from data_pipeline.inputs.draft import Media

MAX_RENDERED_PIXELS = 8_000_000
MIN_FIGURE = 60.0  # points: a smaller drawing is an ornament
MIN_IMAGE = 24.0  # points: a smaller embedded image is an icon
MIN_IMAGE_PIXELS = 28
NEAR = 6.0  # points between graphics of one figure
NEAR_LABEL = 14.0  # points between a figure's side and its axis label
MAX_TEXT_SHARE = 0.3  # of a figure's area: with more, it is framed text or a table
_MAX_RULE_WIDTH = 2.5  # points: a thinner rectangle is a line


@dataclass
class _Graphic:
    """A drawing or an embedded image."""

    rect: Rect
    image: pdfium.PdfImage | None = None  # None for a drawing
    curved: bool = False  # more than a rectangle or a line


@dataclass
class _Cluster:
    """Graphics that touch or nearly touch."""

    rect: Rect
    graphics: list[_Graphic]


def extract_figures(
    page: pdfium.PdfPage, frame: PageFrame, turns: int, text: list[PageItem], turned: list[Rect], dpi: int
) -> tuple[list[PageItem], int]:
    """Return the text outside figures, the figures as items that hold a Media, and the number of images that are small.

    Args:
        page: The page.
        frame: Its visible part.
        turns: Turns that make its text upright.
        text: The text of the page.
        turned: Rectangles of characters at another angle, such as axis labels.
        dpi: Resolution at which drawings are rendered.
    """
    figures: list[PageItem] = []
    visible = Rect(0, 0, *frame.size(turns))
    graphics, small = _graphics(page, frame, turns)
    for cluster in _clusters(graphics, visible):
        if _is_figure(cluster, text):
            cluster, text = _with_labels(cluster, text, turned)
            media = _media(page, frame, turns, cluster, dpi)
            if media is not None:
                figures.append(PageItem(cluster.rect, figure=media))
            else:
                small += 1
    return [*text, *figures], small


def _graphics(page: pdfium.PdfPage, frame: PageFrame, turns: int) -> tuple[list[_Graphic], int]:
    """Return the drawings and images of a page, and the number of images that are too small."""
    graphics = []
    small = 0
    kinds = [pdfium_c.FPDF_PAGEOBJ_IMAGE, pdfium_c.FPDF_PAGEOBJ_PATH, pdfium_c.FPDF_PAGEOBJ_SHADING]
    visible = Rect(0, 0, *frame.size(turns))
    for item in page.get_objects(filter=kinds):
        bounds = item.get_bounds()
        outer = item.container
        while outer is not None:
            bounds = outer.get_matrix().on_rect(*bounds)
            outer = outer.container
        rect = frame.rect(bounds, turns).intersection(visible)
        if rect.width < 0 or rect.height < 0:  # outside the page; a line may have no height
            continue
        if isinstance(item, pdfium.PdfImage):
            if min(rect.width, rect.height) >= MIN_IMAGE and min(item.get_px_size()) >= MIN_IMAGE_PIXELS:
                graphics.append(_Graphic(rect, image=item))
            else:
                small += 1
        elif rect.area < 0.6 * visible.area and _is_drawn(item):
            graphics.append(_Graphic(rect, curved=_is_curved(item)))
    return graphics, small


def _is_drawn(path: pdfium.PdfObject) -> bool:
    """Return whether a path is filled or stroked."""
    if path.type != pdfium_c.FPDF_PAGEOBJ_PATH:
        return True
    fill, stroke = ctypes.c_int(), ctypes.c_int()
    pdfium_c.FPDFPath_GetDrawMode(path, fill, stroke)
    return bool(fill.value or stroke.value)


def _is_curved(path: pdfium.PdfObject) -> bool:
    """Return whether a path is more than a rectangle or a line."""
    if path.type != pdfium_c.FPDF_PAGEOBJ_PATH:
        return True
    count = pdfium_c.FPDFPath_CountSegments(path)
    segments = (pdfium_c.FPDFPath_GetPathSegment(path, index) for index in range(min(count, 12)))
    return count > 12 or any(
        pdfium_c.FPDFPathSegment_GetType(segment) == pdfium_c.FPDF_SEGMENT_BEZIERTO for segment in segments
    )


def _clusters(graphics: Sequence[_Graphic], page: Rect) -> list[_Cluster]:
    """Group graphics that touch or nearly touch.

    A thin line joins no two graphics: the line below a page's header is not part of a figure. A line inside a
    cluster belongs to it.
    """
    clusters: list[_Cluster] = []
    rules = [g for g in graphics if g.image is None and min(g.rect.width, g.rect.height) < _MAX_RULE_WIDTH]
    rule_ids = {id(rule) for rule in rules}
    for graphic in graphics:
        if id(graphic) in rule_ids:
            continue
        merged = _Cluster(graphic.rect, [graphic])
        while touching := [c for c in clusters if _overlap(merged.rect.grown(NEAR), c.rect)]:
            for cluster in touching:
                clusters.remove(cluster)
                merged = _Cluster(merged.rect.union(cluster.rect), cluster.graphics + merged.graphics)
        clusters.append(merged)
    for rule in rules:
        for cluster in clusters:
            shared = cluster.rect.grown(NEAR).intersection(rule.rect.grown(0.1))
            if shared.width > 0 and shared.height > 0 and shared.area > 0.5 * rule.rect.grown(0.1).area:
                cluster.rect = cluster.rect.union(rule.rect)
                cluster.graphics.append(rule)
    return [
        replace(cluster, rect=cluster.rect.intersection(page))
        for cluster in clusters
        if cluster.rect.area < 0.9 * page.area
    ]


def _is_figure(cluster: _Cluster, text: Sequence[PageItem]) -> bool:
    """Return whether a cluster is a figure, not an ornament, a frame around text or a table."""
    if any(graphic.image is not None for graphic in cluster.graphics):
        return True
    if min(cluster.rect.width, cluster.rect.height) < MIN_FIGURE:
        return False
    covered = sum(cluster.rect.intersection(item.rect).area for item in text if _overlap(cluster.rect, item.rect))
    if covered > MAX_TEXT_SHARE * cluster.rect.area:
        return False
    filled = sum(min(graphic.rect.width, graphic.rect.height) >= _MAX_RULE_WIDTH for graphic in cluster.graphics)
    return any(graphic.curved for graphic in cluster.graphics) or filled >= 4


def _overlap(first: Rect, second: Rect) -> bool:
    shared = first.intersection(second)
    return shared.width > 0 and shared.height > 0


def _with_labels(cluster: _Cluster, text: list[PageItem], turned: list[Rect]) -> tuple[_Cluster, list[PageItem]]:
    """Return the cluster extended by the labels in it and beside it, and the text without these labels."""
    rect = cluster.rect
    outside, turned = list(text), list(turned)
    while True:
        near = rect.grown(NEAR)
        beside = Rect(rect.left - NEAR_LABEL, rect.top, rect.right + NEAR_LABEL, rect.bottom)
        labels = [
            item
            for item in outside
            if not is_caption(item.text)
            and (
                near.intersection(item.rect).area > 0.5 * item.rect.area
                or (_overlap(near, item.rect) and item.rect.width < 0.4 * rect.width and len(item.text) < 30)
                or (_overlap(beside, item.rect) and len(item.text) <= 6)
            )
        ]
        axis_labels = [other for other in turned if _overlap(beside, other)]
        if not labels and not axis_labels:
            return replace(cluster, rect=rect), outside
        for found in (*axis_labels, *(item.rect for item in labels)):
            rect = rect.union(found)
        outside = [item for item in outside if item not in labels]
        turned = [other for other in turned if other not in axis_labels]


def _media(page: pdfium.PdfPage, frame: PageFrame, turns: int, cluster: _Cluster, dpi: int) -> Media | None:
    """Return a figure as an image file; None if it has too few pixels."""
    images = [graphic.image for graphic in cluster.graphics if graphic.image is not None]
    scale = dpi / 72
    for graphic in cluster.graphics:
        if graphic.image is not None:  # keep the resolution of an embedded image, up to 600 dpi
            pixels_per_point = max(graphic.image.get_px_size()) / max(graphic.rect.width, graphic.rect.height)
            scale = max(scale, min(pixels_per_point, 600 / 72))
    scale = min(scale, math.sqrt(MAX_RENDERED_PIXELS / max(cluster.rect.area, 1.0)))
    lossy = any("DCTDecode" in image.get_filters() for image in images)
    single = len(cluster.graphics) == len(images) == 1
    margin = 0 if single else 1  # strokes are wider than the bounds of their paths
    rect = cluster.rect.grown(margin).intersection(Rect(0, 0, *frame.size(turns)))
    rendered = _rendered(page, frame, turns, rect, scale)
    if min(rendered.size) < MIN_IMAGE_PIXELS:
        return None
    if single and lossy:
        stored = bytes(images[0].get_data(decode_simple=True))
        if _looks_like(stored, rendered):
            return Media("jpg", stored)
    return encode_image(rendered, lossy=lossy)


def _rendered(page: pdfium.PdfPage, frame: PageFrame, turns: int, rect: Rect, scale: float) -> Image.Image:
    """Return a rectangle of the turned page as an RGB image of `scale` pixels per point."""
    width, height = frame.size(turns)
    for _ in range(turns):  # back to the orientation in the file, one counter-clockwise turn each
        rect = Rect(rect.top, width - rect.right, rect.bottom, width - rect.left)
        width, height = height, width
    margins = (rect.left, height - rect.bottom, width - rect.right, rect.top)
    crop = tuple(max(math.floor(margin * scale) / scale - 1e-6, 0.0) for margin in margins)
    image = page.render(scale=scale, crop=crop, draw_annots=False).to_pil().convert("RGB")
    return image.rotate(-90 * turns, expand=True) if turns else image


def _looks_like(stored: bytes, rendered: Image.Image) -> bool:
    """Return whether a stored JPEG shows what the page shows: not flipped, masked, clipped, inverted or drawn over."""
    try:
        image = Image.open(io.BytesIO(stored))
        if image.mode not in ("RGB", "L"):
            return False
        first, second = (
            np.asarray(each.convert("RGB").resize((32, 32), Image.Resampling.BOX), np.int16)
            for each in (image, rendered)
        )
    except Exception:  # a damaged stream: use what the page renders
        return False
    return float(np.abs(first - second).mean()) < 4.0


def encode_image(image: Image.Image, *, lossy: bool) -> Media:
    """Return an image as a JPEG (lossy, for photographs) or a PNG (for drawings and text)."""
    buffer = io.BytesIO()
    if lossy:
        image.save(buffer, "JPEG", quality=95)
    else:
        image.save(buffer, "PNG")
    return Media("jpg" if lossy else "png", buffer.getvalue())
