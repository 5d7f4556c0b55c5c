"""Images: bytes -> upright RGB -> the model's size -> uint8 patches.

The reference is transformers' default (torchvision) GLM image processor, `Glm4vImageProcessor`, reading files as
`transformers.image_utils.load_image` does. Its last step, (x/255 - mean) / std in float32, is left to the model: pixels
travel as uint8, and a patch of an image is stored once although the model's convolution sees it in both frames.

Shapes: H, W pixels of the resized image (multiples of 28); h = H/14, w = W/14 patches; T frames.
"""

from __future__ import annotations

import io
import math
from functools import lru_cache

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from data_pipeline.errors import BadSample
from data_pipeline.media.pixel_budget import (
    MAX_ASPECT,
    MAX_DECODED_PIXELS,
    MERGE_SIZE,
    MIN_PIXELS,
    PATCH_SIZE,
    PATCHES_PER_TOKEN,
    PIXELS_PER_TOKEN,
    SLICE_BYTES,
    TEMPORAL_PATCH_SIZE,
    TOKEN_SIZE,
)

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


@lru_cache(maxsize=65536)
def resized_size(height: int, width: int, *, max_tokens: int, frames: int = TEMPORAL_PATCH_SIZE) -> tuple[int, int]:
    """Return the size at which the model sees an image, or each frame of a video.

    Sides become multiples of 28; frames*H*W lies between MIN_PIXELS and max_tokens * PIXELS_PER_TOKEN, unless a side of
    one token is already too much. Same arithmetic, roundings included, as transformers' `smart_resize`.

    Args:
        height: Pixels.
        width: Pixels.
        max_tokens: The largest number of tokens of the image or video.
        frames: Frames of the video; 2 for an image.

    Returns:
        (H, W) in pixels.

    Raises:
        BadSample: `extreme_aspect`, if one side is more than 200 times the other or the image has no area.
    """
    if min(height, width) < 1:
        raise BadSample("extreme_aspect", f"an image of {width}x{height} pixels has no area")
    original = f"{width}x{height}"
    if height < TOKEN_SIZE or width < TOKEN_SIZE:
        scale = max(TOKEN_SIZE / height, TOKEN_SIZE / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise BadSample("extreme_aspect", f"{original}: one side is more than {MAX_ASPECT} times the other")

    volume = frames * height * width
    rounded = (round(height / TOKEN_SIZE) * TOKEN_SIZE, round(width / TOKEN_SIZE) * TOKEN_SIZE)
    rounded_volume = round(frames / TEMPORAL_PATCH_SIZE) * TEMPORAL_PATCH_SIZE * rounded[0] * rounded[1]
    if rounded_volume > max_tokens * PIXELS_PER_TOKEN:
        shrink = math.sqrt(volume / (max_tokens * PIXELS_PER_TOKEN))
        return (
            max(TOKEN_SIZE, math.floor(height / shrink / TOKEN_SIZE) * TOKEN_SIZE),
            max(TOKEN_SIZE, math.floor(width / shrink / TOKEN_SIZE) * TOKEN_SIZE),
        )
    if rounded_volume < MIN_PIXELS:
        grow = math.sqrt(MIN_PIXELS / volume)
        return math.ceil(height * grow / TOKEN_SIZE) * TOKEN_SIZE, math.ceil(width * grow / TOKEN_SIZE) * TOKEN_SIZE
    return rounded


def grid_of(size: tuple[int, int]) -> tuple[int, int]:
    """Return the (h, w) patches of an image of (H, W) pixels."""
    return size[0] // PATCH_SIZE, size[1] // PATCH_SIZE


def tokens_of(grid: tuple[int, int]) -> int:
    """Return the tokens of one image or frame pair of (h, w) patches."""
    return grid[0] * grid[1] // PATCHES_PER_TOKEN


def probe_image(data: bytes) -> tuple[int, int]:
    """Return (height, width) of the upright image, from its header.

    A PNG may give its orientation after its pixels: one that does not give it before them is read completely.

    Raises:
        BadSample: The header cannot be read, or the image is too large.
    """
    image = _open(data)
    swapped = image.format != "TIFF" and _orientation(image) in (5, 6, 7, 8)  # Pillow turns TIFF files by itself
    return (image.width, image.height) if swapped else (image.height, image.width)


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


def as_frames(rgb: np.ndarray) -> torch.Tensor:
    """Return uint8 [height, width, 3] as uint8 [1, 3, height, width] over the same memory (channels last)."""
    return torch.from_numpy(rgb)[None].permute(0, 3, 1, 2)


def resize(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize frames with antialiased bicubic interpolation, as torchvision does it.

    The memory is made channels last: torch's vectorised kernel takes half the time there, and gives the same pixels.

    Args:
        frames: uint8 [T, 3, height, width].
        size: (H, W) in pixels.

    Returns:
        uint8 [T, 3, H, W].
    """
    if tuple(frames.shape[-2:]) == tuple(size):
        return frames
    frames = frames.contiguous(memory_format=torch.channels_last)
    return torch.nn.functional.interpolate(frames, size=size, mode="bicubic", align_corners=False, antialias=True)


def patchify(frames: torch.Tensor) -> torch.Tensor:
    """Cut one image (T=1) or frame pair (T=2) into patches.

    Patches come in blocks of 2x2, block by block; a patch's T slices are neighbours, each in (y, x, channel) order.

    One copy: NumPy moves a patch's row of pixels, 14 x 3 bytes, as one element. That takes 0.3 of 2.6 ms for half a
    megapixel; separating the colours here as well would take 0.8. The model does that on its device.

    Args:
        frames: uint8 [T, 3, H, W].

    Returns:
        Slices, uint8 [h*w*T, 588].
    """
    count, _, height, width = frames.shape
    row = np.dtype((np.void, PATCH_SIZE * 3))
    pixels = frames.permute(0, 2, 3, 1).contiguous().numpy().reshape(count, height, width * 3)
    rows = pixels.view(row).reshape(
        count, height // TOKEN_SIZE, MERGE_SIZE, PATCH_SIZE, width // TOKEN_SIZE, MERGE_SIZE
    )
    return torch.from_numpy(rows.transpose(1, 4, 2, 5, 0, 3).copy().view(np.uint8).reshape(-1, SLICE_BYTES))


def image_patches(data: bytes, max_tokens: int) -> tuple[torch.Tensor, tuple[int, int]]:
    """Return an image's slices, uint8 [h*w, 588], and its grid (h, w).

    Raises:
        BadSample: The image cannot be read, is too large or too narrow.
    """
    rgb = decode_image(data)
    size = resized_size(rgb.shape[0], rgb.shape[1], max_tokens=max_tokens)
    return patchify(resize(as_frames(rgb), size)), grid_of(size)


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
