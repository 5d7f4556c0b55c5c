"""Images against transformers.

Sizes and patch order are compared with its Pillow processor (live), pixel values with its default torchvision processor
(goldens.npz, see make_goldens.py).
"""

from __future__ import annotations

import io
import zlib
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from skimage.util import img_as_ubyte
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, load_image
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import smart_resize as reference_size

from data_pipeline.errors import BadSample
from data_pipeline.media.image_files import decode_image, probe_image
from data_pipeline.media.image_sizes import grid_of, resized_size, tokens_of
from data_pipeline.media.images import image_patches, patchify, resize
from tests.data_pipeline.make_goldens import GOLDENS, kept_positions
from tests.data_pipeline.media_files import encoded, pattern, real_images

PUBLISHED_SIZE = {"shortest_edge": 12544, "longest_edge": 9633792}


@pytest.fixture(scope="module")
def goldens() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDENS))


def two_frames(slices: torch.Tensor, frames: int) -> torch.Tensor:
    """Return slices in transformers' order, uint8 [patches, 3, 2, 196]; an image is repeated."""
    colours_last = slices.reshape(-1, frames, 196, 3).expand(-1, 2, -1, -1)
    return colours_last.permute(0, 3, 1, 2).contiguous()


def normalised(slices: torch.Tensor, frames: int) -> np.ndarray:
    """Return slices as transformers' pixel values, float32 [patches, 3 * 2 * 196]."""
    bytes_ = two_frames(slices, frames).to(torch.float32)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) * 255 for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return ((bytes_ - mean) / std).reshape(len(bytes_), -1).numpy()


def assert_golden(goldens: dict[str, np.ndarray], name: str, slices: torch.Tensor, frames: int) -> None:
    pixels = two_frames(slices, frames)
    assert zlib.crc32(pixels.numpy().tobytes()) == goldens[f"{name}/crc32"], name
    kept = torch.from_numpy(kept_positions(pixels.numel()))
    channel = kept % (3 * 2 * 196) // (2 * 196)
    mean, std = (torch.tensor(values) * 255 for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    values = (pixels.reshape(-1)[kept].to(torch.float32) - mean[channel]) / std[channel]
    np.testing.assert_allclose(values, goldens[f"{name}/values"], rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("given", "expected", "tokens"),
    [
        ((28, 28), (84, 84), 9),
        ((100, 100), (112, 112), 16),
        ((336, 336), (336, 336), 144),
        ((512, 768), (504, 756), 486),
        ((1080, 1920), (1092, 1932), 2691),
        ((2160, 3840), (1624, 2912), 6032),
        ((4000, 3000), (2520, 1876), 6030),
        ((30, 5000), (28, 5012), 179),
        ((4000, 6000), (1792, 2688), 6144),
        ((14, 20), (84, 112), 12),
    ],
)
def test_resized_size_of_known_images(given, expected, tokens):
    assert resized_size(*given, max_tokens=6144) == expected
    assert tokens_of(grid_of(expected)) == tokens


@pytest.mark.fast
def test_resized_size_equals_transformers_on_random_images_and_videos():
    rng = np.random.default_rng(0)
    extreme = 0
    for _ in range(4000):
        height, width = np.exp(rng.uniform(0, np.log(9000), 2)).astype(int).tolist()
        frames, max_tokens = int(rng.choice([2, 2, 4, 16, 60, 600])), int(rng.choice([8, 16, 64, 500, 6144, 30000]))
        budget = {"min_pixels": 12544, "max_pixels": max_tokens * 2 * 784}
        try:
            expected = reference_size(num_frames=frames, height=height, width=width, **budget)
        except ValueError:
            extreme += 1
            with pytest.raises(BadSample, match="extreme_aspect"):
                resized_size(height, width, max_tokens=max_tokens, frames=frames)
        else:
            assert resized_size(height, width, max_tokens=max_tokens, frames=frames) == expected
    assert extreme > 50


@pytest.mark.fast
def test_grids_and_token_counts_equal_transformers_on_random_images():
    processor = Glm4vImageProcessorPil(size=PUBLISHED_SIZE)
    rng = np.random.default_rng(1)
    for _ in range(600):
        height, width = np.exp(rng.uniform(np.log(8), np.log(5000), 2)).astype(int).tolist()
        if max(height, width) / min(height, width) > 190:
            continue
        grid = grid_of(resized_size(height, width, max_tokens=6144))
        assert grid[0] * grid[1] == processor.get_number_of_image_patches(height, width)
        assert tokens_of(grid) * 4 == grid[0] * grid[1]


@pytest.mark.fast
def test_patch_order_equals_transformers_on_every_small_grid():
    """The sizes need no resizing: the two processors resample differently."""
    processor = Glm4vImageProcessorPil(size=PUBLISHED_SIZE)
    for case, (rows, columns) in enumerate(product(range(3, 9), repeat=2)):
        pixels = pattern(rows * 28, columns * 28, case)
        expected = processor(Image.fromarray(pixels), return_tensors="pt")
        slices, grid = image_patches(encoded(pixels, "BMP"), max_tokens=6144)
        assert [[1, *grid]] == expected["image_grid_thw"].tolist()
        np.testing.assert_allclose(normalised(slices, 1), expected["pixel_values"], rtol=0, atol=1e-5)


@pytest.mark.fast
def test_patch_order_of_a_small_grid():
    """The patches of a 4x6 grid are filled with their row and column: blocks of 2x2, block by block."""
    rows, columns = np.mgrid[0:4, 0:6]
    filled = np.repeat(np.repeat(rows * 10 + columns, 14, axis=0), 14, axis=1)
    image = torch.from_numpy(np.stack([filled] * 3)).to(torch.uint8)
    order = [divmod(int(value), 10) for value in patchify(image[None])[:, 0]]
    assert order[:9] == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3), (0, 4)]
    assert sorted(order) == [(row, column) for row in range(4) for column in range(6)]

    pair = patchify(torch.stack([image, image + 100]))
    assert pair[0::2].equal(patchify(image[None]))
    assert pair[1::2].equal(patchify(image[None]) + 100)


def test_pixel_values_equal_the_default_processor(goldens):
    names = sorted({name.rsplit("/", 1)[0] for name in goldens if name.startswith("image/")})
    assert len(names) >= 46
    for name in names:
        _, longest_edge, shape, seed = name.split("/")
        height, width = map(int, shape.split("x"))
        slices, grid = image_patches(
            encoded(pattern(height, width, int(seed)), "BMP"),
            max_tokens=int(longest_edge) // (2 * 784),
        )
        assert [[1, *grid]] == goldens[f"{name}/grid"].tolist()
        assert_golden(goldens, name, slices, 1)


def test_real_images_equal_the_default_processor(goldens):
    """50 shapes and many kinds of file: turned, grey, CMYK, 16 bits, transparent, thin, tiny, at the budget ..."""
    for name, data in real_images():
        golden = f"picture/{name}"
        assert zlib.crc32(data) == goldens[f"{golden}/file"], f"{name} differs from the file of make_goldens.py"
        slices, grid = image_patches(data, max_tokens=6144)
        assert [[1, *grid]] == goldens[f"{golden}/grid"].tolist()
        assert_golden(goldens, golden, slices, 1)
        assert grid == grid_of(resized_size(*probe_image(data), max_tokens=6144)), name


@pytest.mark.fast
def test_golden_detects_one_wrong_value(goldens):
    name = next(name for name in goldens if name.startswith("image/9633792/100x100")).rsplit("/", 1)[0]
    slices, _ = image_patches(encoded(pattern(100, 100, int(name.split("/")[-1])), "PNG"), max_tokens=6144)
    assert_golden(goldens, name, slices, 1)
    slices[5, 77] ^= 1
    with pytest.raises(AssertionError):
        assert_golden(goldens, name, slices, 1)


@pytest.mark.fast
def test_colour_modes_equal_transformers(goldens):
    for mode in ("L", "P", "RGBA", "LA", "1", "I;16"):
        slices, _ = image_patches(goldens[f"file/{mode}/bytes"].tobytes(), max_tokens=6144)
        assert_golden(goldens, f"file/{mode}", slices, 1)


@pytest.mark.fast
@pytest.mark.parametrize("options", [{}, {"quality": 30}, {"subsampling": 0}, {"progressive": True}, {"mode": "L"}])
def test_decoded_jpeg_equals_pillow(options):
    for seed, (height, width) in enumerate([(64, 64), (97, 131), (333, 40), (17, 400)]):
        data = encoded(pattern(height, width, seed), "JPEG", **options)
        np.testing.assert_array_equal(decode_image(data), np.asarray(load_image(Image.open(io.BytesIO(data)))))


@pytest.mark.fast
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation_equals_transformers(file_format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(pattern(60, 100), file_format, exif=exif)
    expected = np.asarray(load_image(Image.open(io.BytesIO(data))))
    np.testing.assert_array_equal(decode_image(data), expected)
    assert probe_image(data) == expected.shape[:2]


@pytest.mark.fast
def test_cmyk_jpeg_equals_transformers():
    data = encoded(pattern(60, 100), "JPEG", mode="CMYK")
    np.testing.assert_array_equal(decode_image(data), np.asarray(load_image(Image.open(io.BytesIO(data)))))


@pytest.mark.fast
def test_resize_to_the_same_size_changes_nothing():
    pixels = torch.from_numpy(pattern(56, 84)).permute(2, 0, 1)[None]
    assert resize(pixels, (56, 84)).equal(pixels)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encoded(pattern(200, 200), "JPEG")[:3000], "unreadable_image"),
        (encoded(pattern(200, 200), "PNG")[:3000], "unreadable_image"),
        (encoded(pattern(200, 200), "JPEG")[:40], "unreadable_image"),
        (b"not an image at all", "unreadable_image"),
        (b"", "unreadable_image"),
        (encoded(pattern(10, 3000), "PNG"), "extreme_aspect"),
        (encoded(pattern(6100, 30), "JPEG"), "extreme_aspect"),
        (b'<svg xmlns="http://www.w3.org/2000/svg" width="90" height="90"/>', "unreadable_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 90\n%%EndComments\nshowpage\n%%EOF\n", "unreadable_image"),
    ],
    ids=["truncated_jpeg", "truncated_png", "jpeg_header_only", "text", "empty", "1:300", "203:1", "svg", "eps"],
)
def test_bad_images_have_a_reason(data, reason):
    with pytest.raises(BadSample) as caught:
        image_patches(data, max_tokens=6144)
    assert caught.value.reason == reason


@pytest.mark.fast
@pytest.mark.parametrize("side", [10_000, 20_000])
def test_decompression_bomb_is_rejected_before_decoding(side):
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, "PNG")
    with pytest.raises(BadSample, match="image_too_large"):
        decode_image(buffer.getvalue())


def test_animation_is_decoded_to_its_first_frame():
    frames = [Image.fromarray(pattern(60, 90, seed)) for seed in range(4)]
    for file_format in ("GIF", "PNG", "WEBP", "TIFF"):
        buffer = io.BytesIO()
        frames[0].save(buffer, file_format, save_all=True, append_images=frames[1:], lossless=True)
        expected = np.asarray(load_image(Image.open(io.BytesIO(buffer.getvalue()))))
        np.testing.assert_array_equal(decode_image(buffer.getvalue()), expected)


@pytest.mark.fast
def test_jpeg_of_many_scans_is_rejected_before_decoding():
    """Each scan of a few bytes makes a decoder visit all pixels again: 36 kB here, minutes of work."""
    data = encoded(np.zeros((6000, 6000, 3), dtype=np.uint8), "JPEG", mode="L", progressive=True)
    last_scan = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(BadSample, match="image_too_large") as caught:
        decode_image(data[:-2] + last_scan * 300 + data[-2:])
    assert "306 scans" in caught.value.detail
    assert decode_image(data).shape == (6000, 6000, 3)


def test_goldens_file_is_small():
    assert Path(GOLDENS).stat().st_size < 400_000


def mirrored_conversion(data: bytes) -> np.ndarray:
    """Return what transformers' image processor makes of the PIL image."""
    return np.asarray(convert_to_rgb(ImageOps.exif_transpose(Image.open(io.BytesIO(data))), return_numpy=True))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("file_format", "mode"),
    [
        (file_format, mode)
        for file_format in ("PNG", "WEBP", "TIFF", "GIF", "ICO", "JPEG2000")
        for mode in ("RGBA", "LA", "P")
        if mode != "P" or file_format not in ("JPEG2000", "TIFF")  # they have no transparent palette
    ],
)
def test_transparency_is_shown_on_white_as_in_transformers(file_format: str, mode: str) -> None:
    image = Image.new("RGBA", (48, 48), (0, 0, 0, 0))
    ink = Image.fromarray(pattern(20, 30))
    ink.putalpha(Image.fromarray(pattern(20, 30, 3)[..., 1]))
    image.paste(ink, (5, 9))
    buffer = io.BytesIO()
    image = image.quantize(16) if mode == "P" else image.convert(mode)
    image.save(buffer, file_format)
    pixels = decode_image(buffer.getvalue())
    np.testing.assert_array_equal(pixels, mirrored_conversion(buffer.getvalue()))
    if mode == "RGBA" and file_format != "GIF":
        assert (pixels[0, 0] == 255).all()


@pytest.mark.fast
@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_sixteen_bits_of_grey_are_scaled_as_scikit_image_does(file_format: str) -> None:
    values = (np.arange(60 * 100, dtype=np.uint32).reshape(60, 100) * 10).astype(np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, file_format)
    expected = img_as_ubyte(values)
    np.testing.assert_array_equal(decode_image(buffer.getvalue()), np.stack([expected] * 3, axis=-1))


@pytest.mark.fast
def test_wide_grey_values_of_unknown_range_are_rejected() -> None:
    for values, expected in (
        (np.array([[0, 255]], dtype=np.int32), [0, 255]),
        (np.array([[0, 65535]], dtype=np.int32), [0, 255]),
        (np.array([[0.0, 1.0]], dtype=np.float32), [0, 255]),
        (np.array([[0.0, 200.0]], dtype=np.float32), [0, 200]),
    ):
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, "TIFF")
        assert decode_image(buffer.getvalue())[0, :, 1].tolist() == expected
    for values, most in ((np.array([[0, 1 << 20]], np.int32), "1048576"), (np.array([[0, 1e4]], np.float32), "10000")):
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, "TIFF")
        with pytest.raises(BadSample, match=f"unreadable_image: grey values up to {most} "):
            decode_image(buffer.getvalue())


@pytest.mark.fast
def test_sixteen_bit_grey_with_a_transparent_value_shows_white_there() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.array([[0, 512, 40000]], dtype=np.uint16)).save(buffer, "PNG", transparency=512)
    assert decode_image(buffer.getvalue())[0, :, 0].tolist() == [0, 255, 156]
