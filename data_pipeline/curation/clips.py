"""The filter of clips: whether they decode to their end, last long enough, move, and can be seen."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.curation.candidate import Candidate
from data_pipeline.curation.filters import Drop, Filter
from data_pipeline.curation.thumbnails import black_share, frozen_share


@dataclass
class VideoIntegrity(Filter):
    """`unreadable_video`: not every frame can be decoded. `video_too_short`, `video_too_long`: its duration.
    `frozen_video`, `black_video`: frames that hardly change, or are dark, two frames a second looked at."""

    min_seconds: float = 1.0
    max_seconds: float = 3600.0
    max_frozen: float = 0.8  # share of steps from one frame looked at to the next that change hardly anything
    frozen_change: float = 0.5  # mean change of grey levels, of 255, that is hardly anything
    max_black: float = 0.5  # share of frames that are dark
    black_level: float = 12.0  # mean grey level, of 255, up to which a frame is dark

    def __call__(self, sample: Candidate) -> Drop | None:
        for info in sample.clips:  # before a long one is decoded
            if info.duration < self.min_seconds:
                return Drop("video_too_short", f"{info.duration:.2f} seconds: less than {self.min_seconds:g}")
            if info.duration > self.max_seconds:
                return Drop("video_too_long", f"{info.duration:.1f} seconds: more than {self.max_seconds:g}")
        for clip in sample.thumbnails:
            black = black_share(clip.frames, self.black_level)
            if black > self.max_black:
                return Drop("black_video", f"{black:.0%} of the frames are dark")
            frozen = frozen_share(clip.frames, self.frozen_change)
            if frozen > self.max_frozen:
                return Drop("frozen_video", f"{frozen:.0%} of the frames are like the one before")
        return None
