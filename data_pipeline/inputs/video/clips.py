"""Videos with timed captions, as samples of the `video` domain: whole videos, or one clip per caption.

A folder holds NAME.mp4 with NAME.srt, NAME.vtt or NAME.txt (one caption for the whole video). JSON lines name videos:

    {"video": "street.mp4", "captions": [{"start": 0.0, "end": 2.5, "text": "A van passes."},
                                         {"start": 2.5, "end": 4.0, "text": "The street is empty."}]}

A video becomes one sample. Its text is one line per caption, in seconds from the first frame of the video:

    [0.0-2.5] A van passes.
    [2.5-4.0] The street is empty.

With `segments=cut`, each caption becomes one sample: the clip of the frames shown from start to end, and the caption
alone. Clips are encoded again (H.264 without sound, see cutting.py), so that they begin and end at the exact frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.draft import ONE_RECORD, Draft, Media, Rejected, Unit, credited
from data_pipeline.inputs.media import read_whole
from data_pipeline.inputs.names import beside, files_below
from data_pipeline.inputs.records.annotations import line_units, read_named, read_objects
from data_pipeline.inputs.records.jsonl import count_records
from data_pipeline.inputs.video.cutting import cut_clips
from data_pipeline.inputs.video.subtitles import FORMATS, read_subtitles
from data_pipeline.media.video_files import probe_video
from data_pipeline.shards.members import VIDEO_EXTENSIONS

CAPTION_SUFFIXES = (".srt", ".vtt", ".txt")  # the first file that exists is used
VIDEO_SUFFIXES = tuple(f".{extension}" for extension in VIDEO_EXTENSIONS)
VIDEO_BYTES = 5_000_000  # typical size of a video that JSON lines name


@dataclass(frozen=True)
class Caption:
    """A text about the frames shown in [start, end)."""

    start: float  # seconds from the first frame of the video
    end: float  # seconds from the first frame of the video
    text: str  # one line


@dataclass(frozen=True)
class Clips:
    """Videos with timed captions. A unit is one video, or a range of JSON lines."""

    paths: tuple[str, ...]  # folders of videos with caption files, single videos with theirs, and JSON lines
    videos: str = ""  # folder that the paths in JSON lines are relative to; empty: the folder of the JSON file
    segments: Literal["whole", "cut"] = "whole"  # whole: one sample per video; cut: one clip per caption

    def units(self) -> Sequence[Unit]:
        """Return the units of all paths; `extra["name"]` is the name of a video in its folder."""
        units: list[Unit] = []
        for path in map(Path, self.paths):
            if path.is_dir():
                units += _folder_units(path)
            elif path.suffix.lower() in VIDEO_SUFFIXES:
                units.append(_video_unit(path, path.parent))
            else:
                units += line_units(str(path), bytes_per_line=VIDEO_BYTES)
        return units

    def given(self, unit: Unit) -> Mapping[str, int]:
        """Count the videos: one, or one per line."""
        return ONE_RECORD if "name" in unit.extra else {"records": count_records(unit)}

    def read(self, unit: Unit) -> Iterator[Draft | Rejected]:
        """Yield the samples of a unit. Captions that cannot be used are yielded as Rejected, one by one."""
        for origin, found in _videos(unit, self.videos):
            try:
                if isinstance(found, BadSample):
                    raise found
                video, captions = found
                yield from credited(self._samples(origin, video, captions), ONE_RECORD)
            except BadSample as error:
                yield Rejected(origin, error.reason, error.detail, ONE_RECORD)

    def _samples(self, origin: str, video: Media, given: Any) -> Iterator[Draft | Rejected]:
        if isinstance(given, str):  # one caption for the whole video
            if not given:
                raise BadSample("no_captions", "the caption of the video is empty")
            yield Draft({"domain": "video", "text": given}, videos=[video], origin=origin)
            return
        duration = probe_video(video.data).duration
        captions: list[Caption] = []
        for number, caption in enumerate(given):
            try:
                captions.append(_checked(caption, duration))
            except BadSample as error:
                yield Rejected(f"{origin} caption {number}", error.reason, error.detail)
        if not captions:
            raise BadSample("no_captions", "the video has no valid caption")
        captions.sort(key=lambda caption: (caption.start, caption.end))
        if self.segments == "whole":
            text = "\n".join(f"[{caption.start:.1f}-{caption.end:.1f}] {caption.text}" for caption in captions)
            yield Draft({"domain": "video", "text": text}, videos=[video], origin=origin)
            return
        clips = cut_clips(video.data, [(caption.start, caption.end) for caption in captions])
        for caption, clip in zip(captions, clips, strict=True):
            span = f"{origin} [{caption.start:.1f}-{caption.end:.1f}]"
            if isinstance(clip, BadSample):
                yield Rejected(span, clip.reason, clip.detail)
            else:
                record = {"domain": "video", "text": caption.text, "start": caption.start, "end": caption.end}
                yield Draft(record, videos=[Media("mp4", clip)], origin=span)


def _checked(caption: Any, duration: float) -> Caption:
    """Return a caption whose end is at most the end of the video. Raises BadSample."""
    if not isinstance(caption, dict) or not isinstance(caption.get("text"), str) or not caption["text"].strip():
        raise BadSample("bad_record", 'a caption needs "start", "end" and "text"')
    start, end = caption.get("start"), caption.get("end")
    if not (isinstance(start, (int, float)) and isinstance(end, (int, float)) and 0 <= start < end < 1e9):
        raise BadSample("bad_timestamps", f"from {start} to {end}: give seconds, the start before the end")
    if start >= duration:
        raise BadSample(
            "bad_timestamps", f"the caption starts at {start:g} seconds, but the video ends at {duration:g}"
        )
    return Caption(float(start), min(float(end), duration), " ".join(caption["text"].split()))


def _folder_units(folder: Path) -> list[Unit]:
    videos = sorted(path for path in files_below(folder) if path.suffix.lower() in VIDEO_SUFFIXES)
    if not videos:
        raise DataError(f"{folder} holds no videos ({', '.join(VIDEO_SUFFIXES)}): give a folder of them, or JSON lines")
    return [_video_unit(video, folder) for video in videos]


def _video_unit(video: Path, folder: Path) -> Unit:
    return Unit(str(video), bytes=video.lstat().st_size, extra={"name": str(video.relative_to(folder))})


def _videos(unit: Unit, folder: str) -> Iterator[tuple[str, tuple[Media, Any] | BadSample]]:
    """Yield (origin, (video, captions)) for every video of a unit. Captions are a text, or a list of objects."""
    if "name" in unit.extra:
        yield unit.extra["name"], _or_error(partial(_from_folder, Path(unit.path)))
        return
    root = Path(folder or Path(unit.path).parent)
    for origin, found in read_objects(unit):
        yield origin, found if isinstance(found, BadSample) else _or_error(partial(_from_record, found, root))


def _or_error(read: Callable[[], tuple[Media, Any]]) -> tuple[Media, Any] | BadSample:
    try:
        return read()
    except BadSample as error:
        return error


def _from_folder(video: Path) -> tuple[Media, Any]:
    captions = beside(video, CAPTION_SUFFIXES)
    if captions is None:
        raise BadSample("missing_caption", f"no {video.stem}{' or '.join(CAPTION_SUFFIXES)} is beside the video")
    media = read_named(video.name, video.parent, "videos")
    data = read_whole(captions.name, video.parent)
    if (suffix := captions.suffix.lower()) in FORMATS:
        return media, read_subtitles(data, suffix)
    try:
        return media, data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadSample("bad_text", f"{captions.name} is not UTF-8: {error}") from error


def _from_record(record: dict[str, Any], folder: Path) -> tuple[Media, Any]:
    captions = record.get("captions")
    if not isinstance(captions, list):
        raise BadSample("bad_record", 'a line needs a "video" and a list of "captions"')
    return read_named(record.get("video"), folder, "videos"), captions
