"""Damaged files of every kind: decoding one either succeeds or raises BadSample with a reason.

The tests run in a separate process, because a decoder that crashes would kill the test run.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import BadSample
from data_pipeline.media.image_files import decode_image, probe_image
from data_pipeline.media.images import image_patches
from data_pipeline.media.video import video_patches
from tests.data_pipeline.media_files import encoded, encoded_video, pattern

REASONS = {
    "unreadable_image",
    "image_too_large",
    "extreme_aspect",
    "unreadable_video",
    "video_without_frames",
    "video_too_large",
}


def rotating_exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description to damage"
    return exif


IMAGES = {name: encoded(pattern(70, 90), name) for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")}
IMAGES["JPEG with EXIF"] = encoded(pattern(70, 90), "JPEG", exif=rotating_exif())
IMAGES["progressive JPEG"] = encoded(pattern(70, 90), "JPEG", progressive=True)
VIDEOS = {
    "mp4": encoded_video(12),
    "matroska": encoded_video(12, format="matroska"),
    "avi": encoded_video(12, format="avi", codec="mpeg4"),
    "webm": encoded_video(6, format="webm", codec="libvpx"),
}


def damage(data: bytes, rng: np.random.Generator) -> bytes:
    """Flip bits, replace bytes or cut off the end, a few times, often near the header."""
    damaged = bytearray(data)
    for _ in range(rng.integers(1, 6)):
        offset = int(rng.integers(len(damaged) if rng.integers(2) else min(200, len(damaged))))
        match rng.integers(4):
            case 0:
                damaged[offset] ^= 1 << int(rng.integers(8))
            case 1:
                damaged[offset] = int(rng.integers(256))
            case 2:
                damaged[offset : offset + 4] = rng.bytes(4)
            case 3:
                del damaged[max(offset, 1) :]
    return bytes(damaged)


def decode_damaged_files(cases: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    outcomes: Counter[str] = Counter()
    for case in range(cases):
        is_image = case % 3 != 0
        name = str(rng.choice(list(IMAGES if is_image else VIDEOS)))
        data = damage((IMAGES if is_image else VIDEOS)[name], rng)
        began = time.process_time()
        try:
            if is_image:
                size = probe_image(data)
                image_patches(data, max_tokens=60)
                assert decode_image(data).shape[:2] == size, f"case {case}: the header of a {name} has another size"
            else:
                video_patches(data, max_tokens=60)
            outcomes["read"] += 1
        except BadSample as error:
            outcomes[error.reason] += 1
        assert time.process_time() - began < 20, f"case {case}: a damaged {name} took too long"
    assert set(outcomes) <= REASONS | {"read"}
    assert cases // 10 < outcomes["read"] < cases * 9 // 10


def decode_in_new_process(cases: int, seed: int) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.data_pipeline.loading.test_damage", str(cases), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=cases)
    assert done.returncode == 0, f"exit status {done.returncode} (negative: a crash)\n{done.stderr[-3000:]}"


def test_few_damaged_files_are_decoded_or_bad_samples():
    decode_in_new_process(600, seed=11)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(12, 16))
def test_many_damaged_files_are_decoded_or_bad_samples(seed):
    decode_in_new_process(10_000, seed)


if __name__ == "__main__":
    decode_damaged_files(int(sys.argv[1]), int(sys.argv[2]))
