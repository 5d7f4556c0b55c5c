"""Pictures: bytes -> upright RGB -> the model's size -> uint8 patches.

The reference is transformers' default (torchvision) GLM image processor, `Glm4vImageProcessor`, reading files as
`transformers.image_utils.load_image` does. Its last step, (x/255 - mean) / std in float32, is left to the model: pixels
travel as uint8, and a picture's patch is stored once although the model's convolution sees it at both instants.

Shapes: H, W pixels of the resized picture (multiples of 28); h = H/14, w = W/14 patches; T instants.
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

PATCH_SIZE = 14
MERGE_SIZE = 2  # 2x2 patches make one token
TEMPORAL_PATCH_SIZE = 2  # a video's patch spans two frames; a picture counts as two equal ones
FACTOR = PATCH_SIZE * MERGE_SIZE
SLICE_BYTES = PATCH_SIZE * PATCH_SIZE * 3
TOKEN_PIXELS = TEMPORAL_PATCH_SIZE * FACTOR * FACTOR  # pixels of one token, both instants counted
MIN_PIXELS = 112 * 112  # the published processors' "shortest_edge", both instants counted
MIN_IMAGE_TOKENS = MIN_PIXELS // TOKEN_PIXELS
MAX_ASPECT = 200
MAX_DECODED_PIXELS = 89_478_485  # Pillow's own threshold for a decompression bomb
MAX_SCANNED_PIXELS = 64 * MAX_DECODED_PIXELS  # every scan of a progressive JPEG visits all of its pixels

# The formats that are read. Others that Pillow knows start programs (EPS: Ghostscript) or are no pictures (HDF5, GRIB).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO")
Image.init()  # until then Pillow knows five of them

_START_OF_SCAN, _SCAN_BYTES = 0xDA, 10  # after 0xFF; the least that a scan takes
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
    """The size in pixels that the model sees a picture (or each of `frames` frames of a clip) at.

    Sides become multiples of 28; frames*H*W lies between MIN_PIXELS and max_tokens * TOKEN_PIXELS, except where a side
    of one token is already too much. Same arithmetic, roundings included, as transformers' `smart_resize`.
    Raises BadSample if one side is more than 200 times the other.
    """
    if min(height, width) < 1:
        raise BadSample("extreme_aspect", f"an image of {width}x{height} pixels has no area")
    given = f"{width}x{height}"
    if height < FACTOR or width < FACTOR:
        scale = max(FACTOR / height, FACTOR / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise BadSample("extreme_aspect", f"{given}: one side is more than {MAX_ASPECT} times the other")

    volume = frames * height * width
    rounded = (round(height / FACTOR) * FACTOR, round(width / FACTOR) * FACTOR)
    rounded_volume = round(frames / TEMPORAL_PATCH_SIZE) * TEMPORAL_PATCH_SIZE * rounded[0] * rounded[1]
    if rounded_volume > max_tokens * TOKEN_PIXELS:
        shrink = math.sqrt(volume / (max_tokens * TOKEN_PIXELS))
        return (
            max(FACTOR, math.floor(height / shrink / FACTOR) * FACTOR),
            max(FACTOR, math.floor(width / shrink / FACTOR) * FACTOR),
        )
    if rounded_volume < MIN_PIXELS:
        grow = math.sqrt(MIN_PIXELS / volume)
        return math.ceil(height * grow / FACTOR) * FACTOR, math.ceil(width * grow / FACTOR) * FACTOR
    return rounded


def grid_of(size: tuple[int, int]) -> tuple[int, int]:
    """(H, W) pixels -> (h, w) patches."""
    return size[0] // PATCH_SIZE, size[1] // PATCH_SIZE


def tokens_of(grid: tuple[int, int]) -> int:
    """(h, w) patches -> tokens of one picture or frame pair."""
    return grid[0] * grid[1] // MERGE_SIZE**2


def probe_image(data: bytes) -> tuple[int, int]:
    """(height, width) of the upright picture, from its header. Raises BadSample.

    (A PNG may say behind its pixels which way up it is: one that does not say so before them is read whole.)
    """
    image = _open(data)
    swapped = image.format != "TIFF" and _orientation(image) in (5, 6, 7, 8)  # Pillow turns TIFF files by itself
    return (image.width, image.height) if swapped else (image.height, image.width)


def decode_image(data: bytes) -> np.ndarray:
    """The upright RGB picture, uint8 [height, width, 3]; of an animation, its first frame. Raises BadSample if it
    cannot be read whole."""
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
    """uint8 [height, width, 3] -> the same bytes as uint8 [1, 3, height, width], channels last in memory."""
    return torch.from_numpy(rgb)[None].permute(0, 3, 1, 2)


def resize(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """uint8 [T, 3, height, width] -> uint8 [T, 3, H, W], antialiased bicubic as torchvision does it.

    Channels last in memory: torch's vectorised kernel takes half the time there, and gives the same pixels.
    """
    if tuple(frames.shape[-2:]) == tuple(size):
        return frames
    frames = frames.contiguous(memory_format=torch.channels_last)
    return torch.nn.functional.interpolate(frames, size=size, mode="bicubic", align_corners=False, antialias=True)


def patchify(frames: torch.Tensor) -> torch.Tensor:
    """One picture (T=1) or frame pair (T=2), uint8 [T, 3, H, W] -> slices uint8 [h*w*T, 588].

    Patches come in blocks of 2x2, block by block; a patch's T slices are neighbours, each in (y, x, channel) order.

    One copy: NumPy moves a patch's row of pixels, 14 x 3 bytes, as one element to its place. That is 0.3 of 2.6 ms for
    half a megapixel; to take the colours apart here as well made it 0.8. The model does that on its device.
    """
    instants, _, height, width = frames.shape
    row = np.dtype((np.void, PATCH_SIZE * 3))
    pixels = frames.permute(0, 2, 3, 1).contiguous().numpy().reshape(instants, height, width * 3)
    rows = pixels.view(row).reshape(
        *(instants, height // FACTOR, MERGE_SIZE, PATCH_SIZE),
        *(width // FACTOR, MERGE_SIZE),
    )
    return torch.from_numpy(rows.transpose(1, 4, 2, 5, 0, 3).copy().view(np.uint8).reshape(-1, SLICE_BYTES))


def image_patches(data: bytes, max_tokens: int) -> tuple[torch.Tensor, tuple[int, int]]:
    """A picture's bytes -> (slices uint8 [h*w, 588], (h, w)). Raises BadSample."""
    rgb = decode_image(data)
    size = resized_size(rgb.shape[0], rgb.shape[1], max_tokens=max_tokens)
    return patchify(resize(as_frames(rgb), size)), grid_of(size)


_UNREAD = {b"ftyphei": "HEIC", b"ftypmif1": "HEIC", b"ftypmsf1": "HEIC", b"<svg": "SVG", b"%!PS": "EPS", b"8BPS": "PSD"}
_UNREAD |= {b"%PDF": "PDF", b"<html": "a web page", b"<!DOCTYPE html": "a web page", b"git-lfs": "a Git LFS pointer"}


def _guess(data: bytes) -> str:
    """What a file is that is no picture, as far as its beginning tells: for the one who must mend it."""
    if not data:
        return "the file is empty"
    found = next((name for word, name in _UNREAD.items() if word.lower() in data[:256].lower()), None)
    return f"it seems to be {found}, {len(data):,} bytes" if found else f"{len(data):,} bytes"


def _open(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadSample("image_too_large", str(error)) from error
    except UnidentifiedImageError as error:
        raise BadSample("unreadable_image", f"not an image of a kind that is read: {_guess(data)}") from error
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
    """Where one colour of a picture stands for see-through (PNG, GIF), the reference shows white. Of a picture with
    alpha it shows the colours that the alpha hides."""
    if image.info.get("transparency") is None:
        return image
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _decode_jpeg(data: bytes) -> np.ndarray | None:
    """libjpeg-turbo's answer, equal to Pillow's, a quarter faster; None where it complains: then Pillow judges."""
    try:
        return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
    except ValueError:
        return None
