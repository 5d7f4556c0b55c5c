"""Image files: what their headers say, and their pixels: bytes -> upright RGB.

The reference is transformers' image processor given the upright PIL image. What an image becomes after that is in
images.py. This module does without torch, so that reading inputs takes no second to start.
"""

from __future__ import annotations

import io
import warnings
from functools import lru_cache

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from data_pipeline.errors import BadSample
from data_pipeline.media.file_types import HEAD_BYTES, HEIC, describe, file_type
from data_pipeline.media.pixel_budget import MAX_DECODED_PIXELS

MAX_SCANNED_PIXELS = 64 * MAX_DECODED_PIXELS  # every scan of a progressive JPEG visits all of its pixels

# Pillow knows other formats, but some of them start programs (EPS: Ghostscript) or are not images (HDF5, GRIB).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO")
# Pillow warns of large images, which have limits of their own here, and of damage that changes no pixel. Its warnings
# name no file.
warnings.filterwarnings("ignore", module=r"PIL\.")
Image.init()  # until then Pillow knows five of them

_START_OF_SCAN, _SCAN_BYTES = 0xDA, 10  # after 0xFF; the fewest bytes of a scan
_EXIF_ORIENTATION, _BITS_PER_SAMPLE = 0x0112, 258  # tags
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
        return np.array(_as_rgb(ImageOps.exif_transpose(image)))
    except BadSample:
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged bytes
        raise BadSample("unreadable_image", f"{image.format} of {image.width}x{image.height}: {error}") from error


@lru_cache(maxsize=1)
def reads_heic() -> bool:
    """Return whether pillow-heif is installed. Makes Pillow use it."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def _open(data: bytes) -> Image.Image:
    try:
        heic = file_type(data[:HEAD_BYTES]) is HEIC and reads_heic()
        image = Image.open(io.BytesIO(data), formats=("HEIF",) if heic else FORMATS)
    except Image.DecompressionBombError as error:
        raise BadSample("image_too_large", str(error)) from error
    except UnidentifiedImageError as error:
        raise BadSample(
            "unreadable_image", f"not an image of a supported format: {describe(data)}{_hint(data)}"
        ) from error
    except Exception as error:  # a damaged header: as above, nearly anything
        raise BadSample("unreadable_image", str(error)) from error
    if image.width * image.height > MAX_DECODED_PIXELS:
        raise BadSample("image_too_large", f"{image.width}x{image.height}: more than {MAX_DECODED_PIXELS} pixels")
    if image.format in ("JPEG", "MPO"):
        _check_scans(data, image.width * image.height)
    return image


def _hint(data: bytes) -> str:
    return "; pip install -e '.[heic]' to read it" if file_type(data) is HEIC and not reads_heic() else ""


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


def _as_rgb(image: Image.Image) -> Image.Image:
    """Return the image in RGB: on white where it is transparent, wide grey values as 8 bits.

    Equal to transformers' image processor given the PIL image (`convert_to_rgb`), but for wide grey values: Pillow cuts
    them off at 255, which leaves a white image.
    """
    if image.mode.startswith("I") or image.mode == "F":
        return _narrowed(image)
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _narrowed(image: Image.Image) -> Image.Image:
    """Return an image of 16 or 32 bits of grey in RGB.

    16 bits lose their lower 8 (12 bits: 4), as in OpenCV, libpng and scikit-image. Integers of 32 bits count as 16 bits
    if some are larger than 255 and all fit, as Pillow widens some 16-bit files. Floats from 0 to 1 are scaled, and
    others are taken as they are, up to 255.

    Raises:
        BadSample: unreadable_image, if the range of the values is not known.
    """
    values = np.nan_to_num(np.asarray(image))
    least, most = (values.min(), values.max()) if values.size else (0, 0)
    if image.mode.startswith("I;16") or (image.mode == "I" and (image.format == "PPM" or 255 < most < 65536)):
        values = values >> (_bits(image) - 8)
    elif image.mode in ("I", "F") and most > 255:
        what = f"grey values up to {most:.10g} have no known range: convert it to 8 or 16 bits"
        raise BadSample("unreadable_image", what)
    elif image.mode == "F" and least >= 0 and 0 < most <= 1:
        values = np.rint(values * 255)
    grey = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
    hidden = image.info.get("transparency")
    if isinstance(hidden, int):
        grey.paste(255, mask=Image.fromarray(np.asarray(image) == hidden))
    return grey.convert("RGB")


def _bits(image: Image.Image) -> int:
    """Return the bits of a grey value: 16, but for TIFF files of fewer."""
    bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0]
    return bits if 8 < bits < 16 else 16


def _decode_jpeg(data: bytes) -> np.ndarray | None:
    """Decode with libjpeg-turbo, equal to Pillow and a quarter faster. None if it complains: then Pillow decides."""
    try:
        return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
    except ValueError:
        return None
