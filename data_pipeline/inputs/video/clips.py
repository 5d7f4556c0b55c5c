"""Clips with what is said of their parts, for the video domain.

A folder holds NAME.mp4 with NAME.srt, NAME.vtt or NAME.txt (one caption for all of it); JSON lines name the clip:

    {"video": "street.mp4", "captions": [{"start": 0.0, "end": 2.5, "text": "A van passes."},
                                         {"start": 2.5, "end": 4.0, "text": "The street is empty."}]}

A clip becomes one sample whose text is a line a caption, in seconds from the clip's first frame, as the model reads
them after its frames:

    [0.0-2.5] A van passes.
    [2.5-4.0] The street is empty.

or, with `segments=cut`, a sample a caption: the frames shown from start to end, and the caption alone. Segments are
encoded anew (H.264, see cutting.py), so that they begin and end at the very frame; sound is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.draft import Draft, Media, Rejected, Unit
from data_pipeline.inputs.media import read_whole
from data_pipeline.inputs.names import beside, files_below
from data_pipeline.inputs.records.annotations import line_units, read_named, read_objects
from data_pipeline.inputs.video.cutting import cut_clip
from data_pipeline.inputs.video.subtitles import FORMATS, read_subtitles
from data_pipeline.media.video import probe_video
from data_pipeline.shards.members import VIDEO_EXTENSIONS

CAPTION_SUFFIXES = (".srt", ".vtt", ".txt")  # the first that is there counts
CLIP_SUFFIXES = tuple(f".{extension}" for extension in VIDEO_EXTENSIONS)
CLIP_BYTES = 5_000_000  # what a clip takes, roughly, where its size is not known


@dataclass(frozen=True)
class Caption:
    """What is said of the frames shown in [start, end), seconds from the clip's first frame."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Clips:
    """Folders of clips with caption files, single clips with theirs, and JSON-lines files.

    videos: the folder that the names in JSON lines are relative to; empty: the file's own.
    segments: whole, one sample a clip; cut, one sample a caption.
    """

    paths: tuple[str, ...]
    videos: str = ""
    segments: Literal["whole", "cut"] = "whole"

    def units(self) -> Sequence[Unit]:
        units: list[Unit] = []
        for path in map(Path, self.paths):
            if path.is_dir():
                units += _folder_units(path)
            elif path.suffix.lower() in CLIP_SUFFIXES:
                units.append(_clip_unit(path, path.parent))
            else:
                units += line_units(str(path), bytes_a_line=CLIP_BYTES)
        return units

    def read(self, unit: Unit) -> Iterator[Draft | Rejected]:
        for origin, found in _clips(unit, self.videos):
            try:
                if isinstance(found, BadSample):
                    raise found
                clip, captions = found
                yield from self._samples(origin, clip, captions)
            except BadSample as error:
                yield Rejected(origin, error.reason, error.detail)

    def _samples(self, origin: str, clip: Media, given: Any) -> Iterator[Draft | Rejected]:
        if isinstance(given, str):  # one caption for all of the clip
            if not given:
                raise BadSample("no_captions", "the clip's caption is empty")
            yield Draft({"domain": "video", "text": given}, videos=[clip], origin=origin)
            return
        duration = probe_video(clip.data).duration
        captions: list[Caption] = []
        for number, caption in enumerate(given):
            try:
                captions.append(_checked(caption, duration))
            except BadSample as error:
                yield Rejected(f"{origin} caption {number}", error.reason, error.detail)
        if not captions:
            raise BadSample("no_captions", "the clip has no caption with a time within it")
        captions.sort(key=lambda caption: (caption.start, caption.end))
        if self.segments == "whole":
            text = "\n".join(f"[{caption.start:.1f}-{caption.end:.1f}] {caption.text}" for caption in captions)
            yield Draft({"domain": "video", "text": text}, videos=[clip], origin=origin)
            return
        for caption, segment in zip(captions, cut_clip(clip.data, [(c.start, c.end) for c in captions]), strict=True):
            span = f"{origin} [{caption.start:.1f}-{caption.end:.1f}]"
            if isinstance(segment, BadSample):
                yield Rejected(span, segment.reason, segment.detail)
            else:
                record = {"domain": "video", "text": caption.text, "start": caption.start, "end": caption.end}
                yield Draft(record, videos=[Media("mp4", segment)], origin=span)


def _checked(caption: Any, duration: float) -> Caption:
    """A caption within the clip, its end no later than the clip's. Raises BadSample."""
    if not isinstance(caption, dict) or not isinstance(caption.get("text"), str) or not caption["text"].strip():
        raise BadSample("bad_record", 'a caption needs "start", "end" and "text"')
    start, end = caption.get("start"), caption.get("end")
    if not (isinstance(start, (int, float)) and isinstance(end, (int, float)) and 0 <= start < end < 1e9):
        raise BadSample("bad_timestamps", f"from {start} to {end}: give seconds, the start before the end")
    if start >= duration:
        raise BadSample("bad_timestamps", f"begins at {start:g} seconds, but the clip lasts {duration:g}")
    return Caption(float(start), min(float(end), duration), " ".join(caption["text"].split()))


def _folder_units(folder: Path) -> list[Unit]:
    """One unit a clip that has a caption file; the others are counted when they are read."""
    clips = sorted(path for path in files_below(folder) if path.suffix.lower() in CLIP_SUFFIXES)
    if not clips:
        raise DataError(f"{folder} holds no clips ({', '.join(CLIP_SUFFIXES)}): give such a folder, or JSON lines")
    return [_clip_unit(clip, folder) for clip in clips]


def _clip_unit(clip: Path, folder: Path) -> Unit:
    return Unit(str(clip), bytes=clip.lstat().st_size, extra={"name": str(clip.relative_to(folder))})


def _clips(unit: Unit, videos: str) -> Iterator[tuple[str, tuple[Media, Any] | BadSample]]:
    """(origin, (the clip, its captions: a text, or a list of objects)) of every clip of a unit."""
    if "name" in unit.extra:
        yield unit.extra["name"], _or_error(partial(_from_folder, Path(unit.path)))
        return
    folder = Path(videos or Path(unit.path).parent)
    for origin, found in read_objects(unit):
        yield origin, found if isinstance(found, BadSample) else _or_error(partial(_from_record, found, folder))


def _or_error(read: Callable[[], tuple[Media, Any]]) -> tuple[Media, Any] | BadSample:
    try:
        return read()
    except BadSample as error:
        return error


def _from_folder(clip: Path) -> tuple[Media, Any]:
    captions = beside(clip, CAPTION_SUFFIXES)
    if captions is None:
        raise BadSample("missing_caption", f"no {clip.stem}{' or '.join(CAPTION_SUFFIXES)} lies beside the clip")
    media = read_named(clip.name, clip.parent, "videos")
    data = read_whole(captions.name, clip.parent)
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
