"""Videos: the patches of the frames that the model sees. See video_sampling.py for their choice."""

from __future__ import annotations

from collections.abc import Sequence

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter

from data_pipeline.errors import BadSample
from data_pipeline.media.images import as_frames, patchify, resize
from data_pipeline.media.pixel_budget import SLICE_BYTES, TEMPORAL_PATCH_SIZE
from data_pipeline.media.video_files import VideoInfo, open_video, video_info, video_packets
from data_pipeline.media.video_frames import decode_frames
from data_pipeline.media.video_sampling import GLM45V_VIDEO, VideoForm, VideoGeometry, video_geometry


def video_patches(data: bytes, max_tokens: int, form: VideoForm = GLM45V_VIDEO) -> tuple[torch.Tensor, VideoGeometry]:
    """Return a video's slices, uint8 [pairs*h*w*2, 588], and its geometry.

    Raises:
        BadSample: The video cannot be decoded up to the last sampled frame, is too large, too narrow or too short.
    """
    with open_video(data) as container:
        packets = video_packets(container)
        info = video_info(container, data, packets)
        geometry = video_geometry(info, max_tokens, form)
        return _decode(packets, info, geometry), geometry


def _decode(packets: Sequence[av.Packet], info: VideoInfo, geometry: VideoGeometry) -> torch.Tensor:
    """Return the slices of the sampled frames. Only these are converted and resized, and one is held at a time."""
    h, w = geometry.grid
    slices = torch.empty(len(geometry.seconds), h * w, TEMPORAL_PATCH_SIZE, SLICE_BYTES, dtype=torch.uint8)
    wanted = sorted(set(geometry.indices))
    stored = (info.width, info.height) if info.quarter_turns % 2 else (info.height, info.width)
    missing = set(wanted)
    # One converter for the video, without threads: making one for every frame, as frame.to_ndarray does, takes longer
    # than the conversion, and gives the same pixels.
    converter = VideoReformatter()
    try:
        for index, frame in decode_frames(packets, wanted):
            if (frame.height, frame.width) != stored:
                header = f"{stored[1]}x{stored[0]}"
                raise BadSample(
                    "unreadable_video", f"frame {index} is {frame.width}x{frame.height}, but the header says {header}"
                )
            rgb: np.ndarray = converter.reformat(frame, format="rgb24", threads=1).to_ndarray()
            if info.quarter_turns:
                rgb = np.ascontiguousarray(np.rot90(rgb, info.quarter_turns))
            patches = patchify(resize(as_frames(rgb), geometry.size))
            for position in range(geometry.indices.index(index), len(geometry.indices)):
                if geometry.indices[position] != index:  # the last frame may be sampled twice
                    break
                slices[position // TEMPORAL_PATCH_SIZE, :, position % TEMPORAL_PATCH_SIZE] = patches
            missing.discard(index)
    except BadSample:
        raise
    except (av.error.FFmpegError, ValueError) as error:
        raise BadSample("unreadable_video", str(error)) from error
    if len(missing) == len(wanted):
        raise BadSample("video_without_frames", "no frame could be decoded")
    if missing:
        raise BadSample(
            "unreadable_video", f"{len(missing)} of {len(wanted)} frames are missing: the video is cut short"
        )
    return slices.reshape(-1, SLICE_BYTES)
