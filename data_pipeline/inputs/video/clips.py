"""Videos with timed captions, as samples of the `video` domain: whole videos, or one clip per caption.

A folder holds NAME.mp4 with NAME.srt, NAME.vtt or NAME.txt (one caption for the whole video), or with NAME.en.srt and
other languages (see captions_file.py). JSON lines, or the entries of a JSON list, name videos:

    {"video": "street.mp4", "captions": [{"start": 0.0, "end": 2.5, "text": "A van passes."},
                                         {"start": 2.5, "end": 4.0, "text": "The street is empty."}]}

A video becomes one sample. Its text is one line per caption, in seconds from the first frame of the video:

    [0.0-2.5] A van passes.
    [2.5-4.0] The street is empty.

With `segments=cut`, each caption becomes one sample: the clip of the frames shown from start to end, and the caption
alone. Clips are encoded again (H.264 without sound, see cutting.py), so that they begin and end at the exact frame.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.draft import ONE_RECORD, Draft, Media, NotRead, Rejected, Unit
from data_pipeline.inputs.media import read_whole
from data_pipeline.inputs.names import count_by_suffix, files_below
from data_pipeline.inputs.records.annotations import count_objects, object_units, read_named, read_objects
from data_pipeline.inputs.video.captions_file import choose_captions
from data_pipeline.inputs.video.cutting import cut_clips
from data_pipeline.inputs.video.subtitles import SUFFIXES, read_subtitles, unrolled
from data_pipeline.media.video_files import probe_video
from data_pipeline.shards.members import VIDEO_EXTENSIONS

VIDEO_SUFFIXES = tuple(f".{extension}" for extension in VIDEO_EXTENSIONS)
ONE_CAPTION = {"captions": 1}
_RECORD_KEYS = {"video", "captions"}
_CAPTION_KEYS = {"start", "end", "text"}
MIN_SECONDS = 0.05  # of a caption
VIDEO_BYTES = 5_000_000  # typical size of a video that JSON lines name


@dataclass(frozen=True)
class Caption:
    """A text about the frames shown in [start, end)."""

    start: float  # seconds from the first frame of the video
    end: float  # seconds from the first frame of the video
    text: str  # one line


@dataclass(frozen=True)
class Clips:
    """Videos with timed captions. A unit is one video, or a range of JSON records."""

    paths: tuple[str, ...]  # folders of videos with caption files, single videos with theirs, JSON lines and lists
    videos: str = ""  # folder that the paths in JSON files are relative to; empty: the folder of the JSON file
    segments: Literal["whole", "cut"] = "whole"  # whole: one sample per video; cut: one clip per caption
    language: str = ""  # of subtitles called NAME.LANGUAGE.srt, e.g. en; empty: the only one

    def units(self) -> Sequence[Unit]:
        """Return the units of all paths; `extra["name"]` is the name of a video in its folder."""
        units: list[Unit] = []
        for path in map(Path, self.paths):
            if path.is_dir():
                units += _folder_units(path, self.language)
            elif path.suffix.lower() in VIDEO_SUFFIXES:
                units.append(_video_unit(path, path.parent))
            else:
                units += object_units(str(path), bytes_each=VIDEO_BYTES)
        return units

    def given(self, unit: Unit) -> Mapping[str, int]:
        """Count the video and the folder's other files, or the records."""
        if "name" not in unit.extra:
            return {"records": count_objects(unit)}
        return {"records": 1, "files": sum(unit.extra.get("other", {}).values())}

    def read(self, unit: Unit) -> Iterator[Draft | Rejected | NotRead]:
        """Yield the samples of a unit. Captions that cannot be used are yielded as Rejected, one by one."""
        for name, count in unit.extra.get("other", {}).items():
            yield NotRead(name, count, {"files": count})
        for origin, found, unread in _videos(unit, self.videos, self.language):
            if isinstance(found, BadSample):
                yield Rejected(origin, found.reason, found.detail, ONE_RECORD)
            else:
                video, captions = found
                yield from (NotRead(name, count) for name, count in sorted(unread.items()))
                count = 0 if isinstance(captions, str) else len(captions)
                yield from _accounted(origin, count, self._samples(origin, video, captions))

    def _samples(self, origin: str, video: Media, given: Any) -> Iterator[Draft | Rejected | NotRead]:
        if isinstance(given, str):  # one caption for the whole video
            if not given:
                raise BadSample("no_captions", "the caption of the video is empty")
            yield Draft({"domain": "video", "text": given}, videos=[video], origin=origin)
            return
        duration = probe_video(video.data).duration
        cues, repeated = unrolled(given) if isinstance(given, Cues) else (given, 0)
        if repeated:
            yield NotRead("caption: only repeats the one before", repeated, {"captions": repeated})
        captions: list[Caption] = []
        for number, caption in enumerate(cues):
            if isinstance(given, Cues) and not caption["text"]:
                yield NotRead("caption without text", 1, ONE_CAPTION)
                continue
            try:
                captions.append(_checked(caption, duration))
            except BadSample as error:
                yield Rejected(f"{origin} caption {number}", error.reason, error.detail, ONE_CAPTION)
        if not captions:
            raise BadSample("no_captions", "the video has no valid caption")
        captions.sort(key=lambda caption: (caption.start, caption.end))
        if self.segments == "whole":
            text = "\n".join(f"[{caption.start:.1f}-{caption.end:.1f}] {caption.text}" for caption in captions)
            items = {"captions": len(captions)}
            yield Draft({"domain": "video", "text": text}, videos=[video], origin=origin, items=items)
            return
        clips = cut_clips(video.data, [(caption.start, caption.end) for caption in captions])
        for caption, clip in zip(captions, clips, strict=True):
            span = f"{origin} [{caption.start:.1f}-{caption.end:.1f}]"
            if isinstance(clip, BadSample):
                yield Rejected(span, clip.reason, clip.detail, ONE_CAPTION)
            else:
                record = {"domain": "video", "text": caption.text, "start": caption.start, "end": caption.end}
                yield Draft(record, videos=[Media("mp4", clip)], origin=span, items=ONE_CAPTION)


class Cues(list[Any]):
    """The cues of a subtitle file, which may roll."""


def _accounted(
    origin: str, captions: int, found: Iterable[Draft | Rejected | NotRead]
) -> Iterator[Draft | Rejected | NotRead]:
    """Yield what was read of a video. Its last sample or rejection accounts for the video and gives its captions."""
    last: Draft | Rejected | None = None
    used = 0
    given = {"captions": captions} if captions else {}
    try:
        for entry in found:
            used += entry.items.get("captions", 0)
            if isinstance(entry, NotRead):
                yield entry
                continue
            if last is not None:
                yield last
            last = entry
    except BadSample as error:
        if last is not None:
            yield last
        rest = {"captions": captions - used} if captions > used else {}
        last = Rejected(origin, error.reason, error.detail, rest)
    if last is not None:
        yield replace(last, items={**last.items, **ONE_RECORD}, given=given)


def _checked(caption: Any, duration: float) -> Caption:
    """Return a caption whose end is at most the end of the video. Raises BadSample."""
    if not isinstance(caption, dict) or not isinstance(caption.get("text"), str) or not caption["text"].strip():
        raise BadSample("bad_record", 'a caption needs "start", "end" and "text"')
    start, end = caption.get("start"), caption.get("end")
    if not (isinstance(start, (int, float)) and isinstance(end, (int, float)) and 0 <= start < end < 1e9):
        raise BadSample("bad_timestamps", f"from {start} to {end}: give seconds, the start before the end")
    if end - start < MIN_SECONDS:
        raise BadSample("bad_timestamps", f"from {start:g} to {end:g}: shorter than {MIN_SECONDS} seconds")
    if start >= duration:
        raise BadSample(
            "bad_timestamps", f"the caption starts at {start:g} seconds, but the video ends at {duration:g}"
        )
    return Caption(float(start), min(float(end), duration), " ".join(caption["text"].split()))


def _folder_units(folder: Path, language: str) -> list[Unit]:
    """Return one unit per video. The first one counts the folder's other files, by suffix, in `extra["other"]`."""
    files = sorted(files_below(folder))
    videos = [path for path in files if path.suffix.lower() in VIDEO_SUFFIXES]
    if not videos:
        raise DataError(f"{folder} holds no videos ({', '.join(VIDEO_SUFFIXES)}): give a folder of them, or JSON lines")
    used = set(videos)
    for video in videos:
        with suppress(BadSample):  # the video is rejected when it is read
            used.add(choose_captions(video, language))
    units = [_video_unit(video, folder) for video in videos]
    units[0].extra["other"] = count_by_suffix(path for path in files if path not in used)
    return units


def _video_unit(video: Path, folder: Path) -> Unit:
    return Unit(str(video), bytes=video.lstat().st_size, extra={"name": str(video.relative_to(folder))})


def _videos(
    unit: Unit, folder: str, language: str
) -> Iterator[tuple[str, tuple[Media, Any] | BadSample, Counter[str]]]:
    """Yield (origin, (video, captions), names that are not read) for every video of a unit.

    Captions are a text, Cues, or a list of objects.
    """
    if "name" in unit.extra:
        yield unit.extra["name"], _or_error(partial(_from_folder, Path(unit.path), language)), Counter()
        return
    root = Path(folder or Path(unit.path).parent)
    for origin, found in read_objects(unit):
        if isinstance(found, BadSample):
            yield origin, found, Counter()
        else:
            yield origin, _or_error(partial(_from_record, found, root)), _other_keys(found)


def _or_error(read: Callable[[], tuple[Media, Any]]) -> tuple[Media, Any] | BadSample:
    try:
        return read()
    except BadSample as error:
        return error


def _from_folder(video: Path, language: str) -> tuple[Media, Any]:
    captions = choose_captions(video, language)
    media = read_named(video.name, video.parent, "videos")
    data = read_whole(captions.name, video.parent)
    if (suffix := captions.suffix.lower()) in SUFFIXES:
        return media, Cues(read_subtitles(data, suffix))
    try:
        return media, data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadSample("bad_text", f"{captions.name} is not UTF-8: {error}") from error


def _other_keys(record: dict[str, Any]) -> Counter[str]:
    """Count the keys of a record and of its captions that have no meaning, by name."""
    captions = record.get("captions")
    names = Counter(f"key {key}" for key in record.keys() - _RECORD_KEYS)
    for caption in captions if isinstance(captions, list) else ():
        if isinstance(caption, dict):
            names.update(f"caption key {key}" for key in caption.keys() - _CAPTION_KEYS)
    return names


def _from_record(record: dict[str, Any], folder: Path) -> tuple[Media, Any]:
    captions = record.get("captions")
    if not isinstance(captions, list):
        raise BadSample("bad_record", 'a line needs a "video" and a list of "captions"')
    return read_named(record.get("video"), folder, "videos"), captions
