r"""Make video_goldens.json: what transformers' default decoder, torchcodec, says of the videos of video_cases.py.

torchcodec needs the shared libraries of FFmpeg 4 to 8, which the tests do not have. So this runs once, in a separate
environment (here with the libraries that PyAV ships), and the tests compare with the file:

    python -m venv scratch
    scratch/bin/pip install torch torchcodec==0.13.0 transformers==5.23.0 av==18.1.0 pillow
    for f in scratch/lib/python*/site-packages/av.libs/lib*; do
        ln -s "$PWD/$f" "scratch/lib/$(basename "$f" | sed -E 's/-[0-9a-f]{8}//; s/(\.so\.[0-9]+).*/\1/')"; done
    LD_LIBRARY_PATH=scratch/lib scratch/bin/python tests/data_pipeline/media/make_video_goldens.py

Of every video the file holds its frames, rate, duration and size, the frames that GLM's processor samples, their
seconds, and the number that each decoded frame shows. That is null if torchcodec returns another frame than the one
that it is asked for (it says so: the frame has another time), or none. It does so where FFmpeg cannot seek exactly.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))
from tests.data_pipeline.media.video_cases import CONSTANT, VARIABLE, number_in

# What the processor's method reads of the processor, which needs torchvision.
SAMPLER: Any = SimpleNamespace(fps=2, max_duration=300)
GOLDENS = Path(__file__).with_name("video_goldens.json")


def shown_numbers(path: str, indices: list[int], metadata: Any) -> list[int | None]:
    """Return the number that each of these frames shows, decoded as transformers does: all of them in one call."""
    from torchcodec.decoders import VideoDecoder  # type: ignore[import-not-found]

    decoder = VideoDecoder(path, seek_mode="exact", num_ffmpeg_threads=0)
    try:
        frames = decoder.get_frames_at(indices=indices)
    except RuntimeError:
        return [None] * len(indices)
    begin = decoder.metadata.begin_stream_seconds
    return [
        number_in(pixels.permute(1, 2, 0).numpy())
        if abs(float(time) - begin - index / metadata.fps) <= 0.5 / metadata.fps
        else None
        for index, time, pixels in zip(indices, frames.pts_seconds, frames.data, strict=True)
    ]


def golden(path: str, *, sampled: bool) -> dict[str, Any]:
    """Return what torchcodec says of a file, and what GLM's processor samples of it."""
    from torchcodec.decoders import VideoDecoder
    from transformers.models.glm4v.video_processing_glm4v import Glm4vVideoProcessor
    from transformers.video_utils import VideoMetadata

    said = VideoDecoder(path, seek_mode="exact", num_ffmpeg_threads=0).metadata
    # As transformers.video_utils.read_video_torchcodec makes it, which fails altogether where a frame does not come.
    metadata = VideoMetadata(said.num_frames, fps=said.average_fps, duration=said.duration_seconds)
    found = {
        "frames": said.num_frames,
        "fps": said.average_fps,
        "duration": said.duration_seconds,
        "size": [said.height, said.width],
    }
    if sampled:
        indices = Glm4vVideoProcessor.sample_frames(SAMPLER, metadata).tolist()
        metadata.frames_indices = indices
        found["indices"] = indices
        found["seconds"] = [int(second) for second in metadata.timestamps[::2]]
        found["shown"] = shown_numbers(path, indices, metadata)
    return found


def main() -> None:
    goldens = {}
    made: dict[str, Callable[[], bytes]] = {
        **CONSTANT,
        **{name: partial(make, times) for name, (make, times) in VARIABLE.items()},
    }
    for name, make in made.items():
        with tempfile.NamedTemporaryFile() as file:
            file.write(make())
            file.flush()
            goldens[name] = golden(file.name, sampled=name in CONSTANT)
    lines = (f"{json.dumps(name)}: {json.dumps(found, separators=(',', ':'))}" for name, found in goldens.items())
    GOLDENS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    missing = [name for name, found in goldens.items() if None in found.get("shown", [])]
    print(f"{len(goldens)} videos, {GOLDENS.stat().st_size:,} bytes; torchcodec returns other frames of {missing}")


if __name__ == "__main__":
    main()
