"""Videos of many kinds, made here: every frame shows its own number, and which corner is its first.

Encoders run in one thread. What a video shows does not depend on the machine, so that goldens can name frames by their
numbers: see make_video_goldens.py.
"""

from __future__ import annotations

import io
import struct
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.frame import PictureType

from tests.data_pipeline.media_files import REPRODUCIBLE, make_reproducible

HEIGHT, WIDTH, CELL = 48, 64, 8
BITS = 14
MILLISECONDS = Fraction(1, 1000)
NTSC = Fraction(30000, 1001)
FILM = Fraction(24000, 1001)


def drawing(number: int) -> np.ndarray:
    """Return a grey frame, uint8 [48, 64], that shows a number in 14 cells, with a white corner and a black one."""
    cells = np.full((HEIGHT // CELL, WIDTH // CELL), 128, dtype=np.uint8)
    bits = [number >> bit & 1 for bit in range(BITS)]
    cells[2:4] = np.resize([40 + 175 * bit for bit in bits], (2, WIDTH // CELL))
    cells[0, 0], cells[-1, -1] = 255, 0
    return np.kron(cells, np.ones((CELL, CELL), dtype=np.uint8))


def number_in(pixels: np.ndarray) -> int:
    """Return the number that an upright frame shows, uint8 [48, 64, 3]; -1 if it is turned."""
    grey = pixels.astype(int).mean(axis=-1)
    if grey.shape != (HEIGHT, WIDTH):
        return -1
    cells = grey.reshape(HEIGHT // CELL, CELL, WIDTH // CELL, CELL)[:, 2:6, :, 2:6].mean(axis=(1, 3))
    if cells[0, 0] < 200 or cells[-1, -1] > 60:
        return -1
    return sum(int(cell > 128) << bit for bit, cell in enumerate(cells[2:4].reshape(-1)[:BITS]))


@dataclass(frozen=True)
class Track:
    """A video stream."""

    frames: int
    rate: Fraction | int = 25
    codec: str = "libx264"
    times: Sequence[int] | None = None  # of the frames, in milliseconds; None: at the constant rate
    first: int = 0  # the number that the first frame shows
    turned: int = 0  # degrees, counter-clockwise: frames are stored turned, and the container turns them back
    default: bool | None = None  # the container's flag
    attached: bool = False  # cover art
    options: dict[str, str] = field(default_factory=dict)


def made(*tracks: Track, format: str = "mp4", sound: bool = False, **options: str) -> bytes:
    """Return a file of these streams. options: of the container."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video"
        with av.open(str(path), "w", format=format, options={**REPRODUCIBLE, **options}) as container:
            streams = [_stream(container, track) for track in tracks]
            audio: Any = container.add_stream("aac", rate=16000) if sound else None
            packets = [
                packet for track, stream in zip(tracks, streams, strict=True) for packet in _encode(track, stream)
            ]
            if audio:
                packets += _silence(audio)
            for packet in sorted(packets, key=lambda packet: (packet.dts or 0) * packet.time_base):
                container.mux(packet)
        return path.read_bytes()


def _stream(container: Any, track: Track) -> Any:
    stream = container.add_stream(track.codec, rate=track.rate, options=track.options)
    make_reproducible(stream)
    stream.width, stream.height = (HEIGHT, WIDTH) if track.turned % 180 else (WIDTH, HEIGHT)
    stream.pix_fmt = "yuvj420p" if track.codec == "mjpeg" else "yuv420p"
    if track.times is not None:
        stream.time_base = stream.codec_context.time_base = MILLISECONDS
    if track.turned:
        stream.set_display_rotation(track.turned)
    if track.default is not None:
        stream.disposition = av.stream.Disposition.default if track.default else av.stream.Disposition(0)
    if track.attached:
        stream.disposition = av.stream.Disposition.attached_pic
    return stream


def _encode(track: Track, stream: Any) -> list[av.Packet]:
    packets = []
    for number in range(track.frames):
        pixels = np.rot90(drawing(track.first + number), -track.turned // 90)
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "gray").reformat(format=stream.pix_fmt)
        frame.pict_type = PictureType.NONE
        if track.times is None:
            frame.pts, frame.time_base = number, 1 / Fraction(track.rate)
        else:
            frame.pts, frame.time_base = track.times[number], MILLISECONDS
        packets += stream.encode(frame)
    return packets + list(stream.encode())


def _silence(audio: Any) -> list[av.Packet]:
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
    frame.sample_rate = 16000
    return list(audio.encode(frame)) + list(audio.encode())


def edited(data: bytes, *edits: tuple[float, float]) -> bytes:
    """Replace the edit list of an MP4 of one video stream: (start, duration) in seconds; a start of -1 is a pause."""
    with av.open(io.BytesIO(data)) as container:
        media_ticks = (container.streams.video[0].time_base or MILLISECONDS).denominator
    old = data.index(b"edts") - 4
    size = struct.unpack_from(">I", data, old)[0]
    movie_ticks = struct.unpack_from(">I", data, data.index(b"mvhd") + 16)[0]
    first = struct.unpack_from(">i", data, data.index(b"elst") + 16)[0]
    entries = b"".join(
        struct.pack(">Iihh", round(length * movie_ticks), -1 if start < 0 else first + round(start * media_ticks), 1, 0)
        for start, length in edits
    )
    elst = struct.pack(">I4sII", 16 + len(entries), b"elst", 0, len(edits)) + entries
    new = struct.pack(">I4s", 8 + len(elst), b"edts") + elst
    grown = bytearray(data[:old] + new + data[old + size :])
    for box in (b"moov", b"trak"):
        at = grown.index(box) - 4
        struct.pack_into(">I", grown, at, struct.unpack_from(">I", grown, at)[0] + len(new) - size)
    return bytes(grown)


def with_dropped_frames(data: bytes, dropped: Sequence[int]) -> bytes:
    """Empty some packets of an AVI: the frame before stays on screen. Its index and chunks keep their places."""
    changed = bytearray(data)
    index = changed.index(b"idx1") + 8
    movie = changed.index(b"movi")
    for number in dropped:
        at = index + 16 * number
        offset, size = struct.unpack_from("<II", changed, at + 8)
        struct.pack_into("<I", changed, at + 12, 0)
        struct.pack_into("<I", changed, movie + offset + 4, 0)
        filler = movie + offset + 8
        if size >= 8:  # what was the frame becomes a chunk that nobody reads
            struct.pack_into("<4sI", changed, filler, b"JUNK", (size + 1) // 2 * 2 - 8)
    return bytes(changed)


def steady(frames: int, rate: float, start: int = 0) -> list[int]:
    """Return the times of frames at a constant rate, rounded to milliseconds as Matroska does."""
    return [start + round(1000 * number / rate) for number in range(frames)]


def uneven(frames: int, seed: int, mean: float = 40) -> list[int]:
    """Return times with random gaps."""
    gaps = np.random.default_rng(seed).exponential(mean, frames - 1).astype(int) + 1
    return [0, *np.cumsum(gaps).tolist()]


B_FRAMES = {"bf": "3", "g": "24"}
SLIDES = [*range(0, 2000, 40), 12000, 22000, 32000, 42000]  # a screen that stands still
JITTER = [40 * number + [0, 3, -2, 5, -4][number % 5] for number in range(75)]
JITTER[0] = 0

MP4_RATES: list[tuple[str, Fraction | int, int]] = [
    ("1", 1, 7),
    ("2", 2, 9),
    ("8", 8, 21),
    ("12", 12, 40),
    ("15", 15, 47),
    ("23.976", FILM, 75),
    ("24", 24, 72),
    ("25", 25, 80),
    ("29.97", NTSC, 91),
    ("30", 30, 61),
    ("50", 50, 126),
    ("59.94", Fraction(60000, 1001), 150),
    ("120", 120, 250),
    ("7.5", Fraction(15, 2), 31),
]
MKV_RATES: list[tuple[str, Fraction | int, int]] = [
    ("23.976", FILM, 75),
    ("24", 24, 72),
    ("29.97", NTSC, 91),
    ("30", 30, 100),
    ("60", 60, 130),
]

CONSTANT: dict[str, Callable[[], bytes]] = {
    **{f"mp4 {name} fps": partial(made, Track(frames, rate, options=B_FRAMES)) for name, rate, frames in MP4_RATES},
    **{
        f"mkv {name} fps": partial(made, Track(frames, rate, options=B_FRAMES), format="matroska")
        for name, rate, frames in MKV_RATES
    },
    "one frame": lambda: made(Track(1)),
    "two frames": lambda: made(Track(2)),
    "three frames": lambda: made(Track(3, 2)),
    "one frame, mkv": lambda: made(Track(1), format="matroska"),
    "open groups": lambda: made(Track(80, 24, options={**B_FRAMES, "x264-params": "open-gop=1:scenecut=0"})),
    "pyramid of B-frames, no edit list": lambda: made(Track(60, options=B_FRAMES), use_editlist="0"),
    "fragments": lambda: made(Track(60, 30, options={"g": "15"}), movflags="frag_keyframe+empty_moov"),
    "HEVC": lambda: made(Track(60, 24, "libx265", options={"x265-params": "log-level=none:pools=1"})),
    "AV1": lambda: made(Track(40, 25, "libsvtav1", options={"preset": "13"}), format="webm"),
    "VP9": lambda: made(Track(60, 25, "libvpx-vp9", options={"cpu-used": "8"}), format="webm"),
    "VP8": lambda: made(Track(60, 30, "libvpx", options={"cpu-used": "8"}), format="webm"),
    "mov, MJPEG": lambda: made(Track(40, 15, "mjpeg"), format="mov"),
    "avi": lambda: made(Track(60, 25, "mpeg4"), format="avi"),
    "avi, B-frames": lambda: made(Track(60, NTSC, "mpeg4", options={"bf": "2"}), format="avi"),
    "avi, H.264 with B-frames": lambda: made(Track(60, 25, options=B_FRAMES), format="avi"),
    "avi, MJPEG": lambda: made(Track(30, 12, "mjpeg"), format="avi"),
    "ts": lambda: made(Track(75, 25, options=B_FRAMES), format="mpegts"),
    "ts 29.97 fps": lambda: made(Track(91, NTSC, options=B_FRAMES), format="mpegts"),
    "ts, MPEG-2": lambda: made(Track(60, 25, "mpeg2video", options={"bf": "2"}), format="mpegts"),
    "m2ts": lambda: made(Track(75, 24, options=B_FRAMES), format="mpegts", mpegts_m2ts_mode="1"),
    "mpeg program stream": lambda: made(Track(60, 25, "mpeg2video"), format="vob"),
    "asf": lambda: made(Track(60, 25, "wmv2"), format="asf"),
    "asf 29.97 fps": lambda: made(Track(60, NTSC, "wmv1"), format="asf"),
    "flv": lambda: made(Track(60, 25, "flv"), format="flv"),
    "flv, H.264": lambda: made(Track(61, 30, options=B_FRAMES), format="flv"),
    "ogg": lambda: made(Track(60, 25, "libvpx", options={"cpu-used": "8"}), format="ogg"),
    "long, 12 fps": lambda: made(Track(3720, 12, options={"preset": "ultrafast"})),
    "long, fewer than 600 frames": lambda: made(Track(400, 1, options={"preset": "ultrafast"})),
    "long, 3 fps mkv": lambda: made(Track(1000, 3, options={"preset": "ultrafast"}), format="matroska"),
    "exactly 300 seconds": lambda: made(Track(1500, 5, options={"preset": "ultrafast"})),
    "starts at 5 s, mkv": lambda: made(Track(60, times=steady(60, 25, 5000)), format="matroska"),
    "starts at 3 s, mp4": lambda: made(Track(60, times=steady(60, 25, 3000))),
    "starts at 1.5 s, asf": lambda: made(Track(60, 25, "wmv2", times=steady(60, 25, 1500)), format="asf"),
    **{f"turned by {turned}": partial(made, Track(30, 10, turned=turned)) for turned in (90, 180, 270)},
    "turned by 90, mov MJPEG": lambda: made(Track(20, 10, "mjpeg", turned=90), format="mov"),
    "turned by 90, mkv": lambda: made(Track(30, 10, turned=90), format="matroska"),
    "cover art first": lambda: made(Track(1, codec="mjpeg", first=9000, attached=True), Track(50, 25), format="mp4"),
    "still before the default, mkv": lambda: made(
        Track(1, codec="mjpeg", first=9000, default=False), Track(125, 25, default=True), format="matroska"
    ),
    "second stream is the default, mkv": lambda: made(
        Track(50, 25, first=5000, default=False), Track(75, 25, default=True), format="matroska"
    ),
    "small jitter": lambda: made(Track(75, times=JITTER), format="matroska"),
    "sound": lambda: made(Track(50, 25), sound=True),
    "edited from the middle": lambda: edited(made(Track(100, 25, options=B_FRAMES)), (1.48, 2.0)),
    "edited without the end": lambda: edited(made(Track(150, 30, options=B_FRAMES)), (0, 1.0)),
    "edited after a pause": lambda: edited(made(Track(50, 25)), (-1, 2.0), (0, 2.0)),
    "edited two parts": lambda: edited(made(Track(100, 25, options={"bf": "0"})), (0.4, 1.0), (2.4, 1.2)),
}

DROPPED = [*range(13, 40), 55, 56, 57]
SLOWER = [*range(0, 2000, 40), *range(2000, 6000, 80)]
FAST = {"preset": "ultrafast"}

# Videos of a variable rate, with the true time of each frame in milliseconds. All of them begin at 0.
VARIABLE: dict[str, tuple[Callable[[list[int]], bytes], list[int]]] = {
    "slides": (lambda times: _timed(times), SLIDES),
    "slides, mkv": (lambda times: _timed(times, format="matroska"), SLIDES),
    "random gaps": (lambda times: _timed(times, **B_FRAMES), uneven(200, 1)),
    "random gaps, mkv": (lambda times: _timed(times, format="matroska"), uneven(150, 2, 90)),
    "random gaps, webm": (lambda times: _timed(times, "libvpx", "webm"), uneven(100, 3, 60)),
    "random gaps, ts": (lambda times: _timed(times, format="mpegts"), uneven(100, 4, 60)),
    "random gaps, flv": (lambda times: _timed(times, format="flv"), uneven(100, 5, 60)),
    "random gaps, asf": (lambda times: _timed(times, "wmv2", "asf"), uneven(100, 6, 60)),
    "long, random gaps": (lambda times: _timed(times, **FAST), uneven(1500, 7, 260)),
    "long, few frames": (lambda times: _timed(times, **FAST), uneven(300, 8, 2000)),
    "half as fast after two seconds": (lambda times: _timed(times), SLOWER),
    "two frames ten seconds apart": (lambda times: _timed(times), [0, 10000]),
    "avi, dropped frames": (
        lambda _: with_dropped_frames(made(Track(100, 10, "mpeg4", options={"g": "1"}), format="avi"), DROPPED),
        [100 * number for number in range(100) if number not in DROPPED],
    ),
}


def _timed(times: Sequence[int], codec: str = "libx264", format: str = "mp4", **options: str) -> bytes:
    return made(Track(len(times), codec=codec, times=times, options=options), format=format)
