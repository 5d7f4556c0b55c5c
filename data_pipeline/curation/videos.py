"""The filter of videos: whether they decode completely, last long enough, move, and are not dark."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.curation.candidate import Candidate
from data_pipeline.curation.filters import Filter, Filtered, check_shares
from data_pipeline.curation.thumbnails import black_share, frozen_share


@dataclass
class VideoIntegrity(Filter):
    """`unreadable_video`, `video_too_short`, `video_too_long`, `frozen_video`, `black_video`.

    Every frame must decode. Two frames per second are checked for changes and darkness.
    """

    min_seconds: float = 1.0
    max_seconds: float = 3600.0
    max_frozen: float = 0.8  # largest share of steps between checked frames without a visible change
    frozen_change: float = 0.5  # largest mean change of grey levels, of 255, that counts as none
    max_black: float = 0.5  # largest share of dark frames
    black_level: float = 12.0  # largest mean grey level, of 255, of a dark frame

    def check(self) -> None:
        """Raise DataError for options that cannot work."""
        check_shares("video_integrity", {"max_frozen": self.max_frozen, "max_black": self.max_black})

    def __call__(self, sample: Candidate) -> Filtered | None:
        """Return why the sample is filtered, or None."""
        for info in sample.video_infos:  # before a long video is decoded
            if info.duration < self.min_seconds:
                return Filtered("video_too_short", f"{info.duration:.2f} seconds: less than {self.min_seconds:g}")
            if info.duration > self.max_seconds:
                return Filtered("video_too_long", f"{info.duration:.1f} seconds: more than {self.max_seconds:g}")
        for video in sample.thumbnails:
            black = black_share(video.frames, self.black_level)
            if black > self.max_black:
                return Filtered("black_video", f"{black:.0%} of the frames are dark")
            frozen = frozen_share(video.frames, self.frozen_change)
            if frozen > self.max_frozen:
                return Filtered("frozen_video", f"{frozen:.0%} of the frames equal the one before")
        return None
