"""Image files: what their headers say, and their pixels: bytes -> upright RGB.

The reference is `transformers.image_utils.load_image`. What an image becomes after that is in images.py. This module
does without torch, so that reading inputs takes no second to start.
"""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from data_pipeline.errors import BadSample
from data_pipeline.media.pixel_budget import MAX_DECODED_PIXELS

MAX_SCANNED_PIXELS = 64 * MAX_DECODED_PIXELS  # every scan of a progressive JPEG visits all of its pixels

# Pillow knows other formats, but some of them start programs (EPS: Ghostscript) or are not images (HDF5, GRIB).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO")
Image.init()  # until then Pillow knows five of them

_START_OF_SCAN, _SCAN_BYTES = 0xDA, 10  # after 0xFF; the fewest bytes of a scan
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def probe_image(data: bytes) -> tuple[int, int]:
    """Return (height, width) of the upright image, from its header.

    A PNG may give its orientation after its pixels: one that does not give it before them is read completely.

    Raises:
        BadSample: The header cannot be read, or the image is too large.
    """
    image = _open(data)
    swapped = image.format != "TIFF" and _orientation(image) in (5, 6, 7, 8)  # Pillow turns TIFF files by itself
    return (image.width, image.height) if swapped else (image.height, image.width)


def probe_frame(data: bytes) -> tuple[tuple[int, int], int]:
    """Return the (height, width) that an image is stored with, and its EXIF orientation, 1 to 8.

    Pillow turns TIFF files as it opens them: they count as stored upright.

    Raises:
        BadSample: As probe_image.
    """
    image = _open(data)
    orientation = 1 if image.format == "TIFF" else _orientation(image)
    return (image.height, image.width), orientation if orientation in _UPRIGHT else 1


def decode_image(data: bytes) -> np.ndarray:
    """Return the upright RGB image, uint8 [height, width, 3]; of an animation, its first frame.

    Raises:
        BadSample: The image cannot be read completely, or is too large.
    """
    image = _open(data)
    try:
        if image.format == "JPEG" and image.mode in ("RGB", "L"):
            rgb = _decode_jpeg(data)
            if rgb is not None:
                turn = _UPRIGHT.get(_orientation(image))
                return rgb if turn is None else np.array(Image.fromarray(rgb).transpose(turn))
        return np.array(_on_white(ImageOps.exif_transpose(image).convert("RGB")))
    except BadSample:
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged bytes
        raise BadSample("unreadable_image", f"{image.format} of {image.width}x{image.height}: {error}") from error


_UNSUPPORTED = {
    b"ftyphei": "HEIC",
    b"ftypmif1": "HEIC",
    b"ftypmsf1": "HEIC",
    b"<svg": "SVG",
    b"%!PS": "EPS",
    b"8BPS": "PSD",
    b"%PDF": "PDF",
    b"<html": "a web page",
    b"<!DOCTYPE html": "a web page",
    b"git-lfs": "a Git LFS pointer",
}


def _describe(data: bytes) -> str:
    """Say what a file that is not a supported image seems to be, judging by its first bytes."""
    if not data:
        return "the file is empty"
    found = next((name for word, name in _UNSUPPORTED.items() if word.lower() in data[:256].lower()), None)
    return f"it seems to be {found}, {len(data):,} bytes" if found else f"{len(data):,} bytes"


def _open(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadSample("image_too_large", str(error)) from error
    except UnidentifiedImageError as error:
        raise BadSample("unreadable_image", f"not an image of a supported format: {_describe(data)}") from error
    except Exception as error:  # a damaged header: as above, nearly anything
        raise BadSample("unreadable_image", str(error)) from error
    if image.width * image.height > MAX_DECODED_PIXELS:
        raise BadSample("image_too_large", f"{image.width}x{image.height}: more than {MAX_DECODED_PIXELS} pixels")
    if image.format in ("JPEG", "MPO"):
        _check_scans(data, image.width * image.height)
    return image


def _check_scans(data: bytes, pixels: int) -> None:
    if pixels * (len(data) // _SCAN_BYTES) > MAX_SCANNED_PIXELS:  # else there is no need to count
        marks = np.frombuffer(data, dtype=np.uint8)  # bytes.count takes five times as long
        scans = int(np.count_nonzero((marks[:-1] == 0xFF) & (marks[1:] == _START_OF_SCAN)))
        if pixels * scans > MAX_SCANNED_PIXELS:
            raise BadSample("image_too_large", f"a JPEG of {pixels} pixels in {scans} scans")


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception as error:
        raise BadSample("unreadable_image", f"damaged EXIF data: {error}") from error


def _on_white(image: Image.Image) -> Image.Image:
    """Show white where an image (PNG, GIF) marks one colour as transparent, as the reference does.

    An image with an alpha channel keeps the colours that its alpha hides, again as in the reference.
    """
    if image.info.get("transparency") is None:
        return image
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _decode_jpeg(data: bytes) -> np.ndarray | None:
    """Decode with libjpeg-turbo, equal to Pillow and a quarter faster. None if it complains: then Pillow decides."""
    try:
        return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
    except ValueError:
        return None
