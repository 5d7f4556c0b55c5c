"""What a file is, from its bytes: against the writers of FFmpeg and Pillow, whatever the name says."""

from __future__ import annotations

import base64
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipeline.errors import BadSample
from data_pipeline.inputs.flow import image_media
from data_pipeline.inputs.media import as_media
from data_pipeline.media.file_types import file_type
from data_pipeline.media.image_files import FORMATS, decode_image, reads_heic
from data_pipeline.media.video_files import probe_video
from data_pipeline.shards.members import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from tests.data_pipeline.inputs.reading import opened, read
from tests.data_pipeline.media_files import encoded, encoded_video, pattern

pytestmark = pytest.mark.fast

AVIF = encoded(pattern(40, 60), "AVIF")
HEIC_HEAD = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(200)
# What Pillow and FFmpeg write -> the extension that shards give it.
IMAGES = {
    "JPEG": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "DIB": "dib",
    "TIFF": "tif",
    "AVIF": "avif",
    "JPEG2000": "jp2",
    "PPM": "ppm",
    "ICO": "ico",
}
VIDEOS = {
    ("mp4", "libx264"): "mp4",
    ("mov", "libx264"): "mov",
    ("ipod", "libx264"): "m4v",
    ("3gp", "libx264"): "3gp",
    ("matroska", "libx264"): "mkv",
    ("webm", "libvpx"): "webm",
    ("avi", "libx264"): "avi",
    ("mpegts", "libx264"): "ts",
    ("flv", "flv"): "flv",
    ("asf", "msmpeg4"): "wmv",
    ("mpeg", "mpeg2video"): "mpg",
    ("ogg", "libvpx"): "ogv",
}


def test_images_of_every_format_have_the_extension_of_their_content() -> None:
    assert set(IMAGES) == set(FORMATS)
    for format, extension in IMAGES.items():
        data = encoded(pattern(40, 60), format)
        for name in (None, f"a.{extension}", "a.jpg", "a.mp4", "a"):
            field, media = as_media(data, name)
            assert (field, media.extension) == ("images", extension), (format, name)
        assert image_media(data).extension == extension
        assert decode_image(data).shape[2] == 3
    assert set(IMAGES.values()) <= set(IMAGE_EXTENSIONS)


@pytest.mark.parametrize(("written", "extension"), VIDEOS.items(), ids="-".join)
def test_videos_of_every_container_have_the_extension_of_their_content(
    written: tuple[str, str], extension: str
) -> None:
    rate = 25 if written[0] == "mpeg" else 8
    data = encoded_video(8, format=written[0], codec=written[1], height=144, width=176, fps=rate)
    for name in (None, f"a.{extension}", "a.jpg", "a.dat"):
        assert as_media(data, name)[0] == "videos"
        assert as_media(data, name)[1].extension == extension
    assert extension in VIDEO_EXTENSIONS
    assert probe_video(data).frames >= 8


def test_transport_streams_of_192_byte_packets_are_recognised() -> None:
    stream = encoded_video(8, format="mpegts")
    timed = b"".join(b"\0\0\0\0" + stream[at : at + 188] for at in range(0, len(stream), 188))
    assert as_media(timed, "a.MTS")[1].extension == "mts"
    assert as_media(timed)[1].extension == "m2ts"


def test_spellings_of_one_type_keep_the_name() -> None:
    jpeg, tiff, mp4, mov = (
        encoded(pattern(8, 8)),
        encoded(pattern(8, 8), "TIFF"),
        encoded_video(2),
        encoded_video(2, format="mov"),
    )
    for data, name, extension in (
        (jpeg, "a.JPEG", "jpeg"),
        (jpeg, "a.jfif", "jpg"),
        (tiff, "a.tiff", "tiff"),
        (mp4, "a.mov", "mov"),
        (mov, "a.mp4", "mp4"),
        (mp4, "a.avi", "mp4"),
    ):
        assert as_media(data, name)[1].extension == extension


def box(main: bytes, *others: bytes) -> bytes:
    content = b"ftyp" + main + bytes(4) + b"".join(others)
    return (len(content) + 4).to_bytes(4, "big") + content + bytes(64)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (box(b"avif", b"mif1", b"miaf"), "AVIF"),
        (box(b"avis", b"msf1", b"iso8"), "AVIF"),
        (box(b"mif1", b"avif", b"miaf"), "AVIF"),
        (box(b"msf1", b"avis"), "AVIF"),
        (box(b"heix", b"mif1"), "HEIC"),
        (box(b"mif1", b"heic"), "HEIC"),
        (box(b"msf1", b"hevc"), "HEIC"),
        (box(b"mif1"), "HEIC"),
        (box(b"isom", b"iso2", b"avc1", b"mp41"), "MP4"),
        (box(b"dash", b"iso6", b"mp41"), "MP4"),
        (box(b"qt  "), "MOV"),
        (box(b"M4V ", b"mp42", b"isom"), "M4V"),
        (box(b"3gp4", b"isom"), "3GP"),
        (box(b"M4A ", b"mp42"), "audio"),
        (box(b"crx ", b"isom"), "a raw photograph (CR3)"),
        (b"\0\0\0\x08wide\0\0\0\x08mdat", "MOV"),
        (b"\xff\x0a" + bytes(30), "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b'<?xml version="1.0"?>\n<!-- made by hand -->\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"\xef\xbb\xbf  <SVG/>", "SVG"),
        (b"<?xml version='1.0'?>" + b"<!---->" * 200 + b"<kml>", "XML"),  # in no time
        (b"8BPS\0\1", "PSD"),
        (b"%PDF-1.7", "PDF"),
        (b"<!DOCTYPE html><html>404</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
        (b"P5 # made by hand\n3 3 255\n", "Netpbm"),
    ],
)
def test_type_of_first_bytes(data: bytes, name: str) -> None:
    found = file_type(data)
    assert found is not None
    assert found.name == name
    if found.kind == "other":
        with pytest.raises(BadSample, match=f"unreadable_image: a.jpg: it seems to be {name[:5]}"):
            as_media(data, "a.jpg")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        b"BM, said the letter",
        b"GOGO" * 400,
        b"Portable",
        b"P5",
        b"<b>hello</b>",
        b"The free world",
        b"FLV is",
    ],
)
def test_other_bytes_have_no_type(data: bytes) -> None:
    assert file_type(data) is None


def fates(folder: Path, data: bytes, name: str) -> dict[str, str]:
    """Return what becomes of a file in every input: its extension in a shard, or why it is rejected."""
    root = folder / "inputs"
    (root / "pets").mkdir(parents=True, exist_ok=True)
    (root / "pets" / name).write_bytes(data)
    (root / "pets" / Path(name).with_suffix(".txt")).write_text("A cat.")
    uri = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
    for file, image in (("named.jsonl", f"pets/{name}"), ("uri.jsonl", uri)):
        (root / file).write_text(json.dumps({"domain": "image_text", "text": "A cat.", "images": [image]}))
    pq.write_table(pa.table({"image": [{"bytes": data, "path": name}], "text": ["A cat."]}), root / "a.parquet")
    with tarfile.open(root / "a.tar", "w") as tar:
        tar.add(root / "pets" / name, f"1{Path(name).suffix}")
        tar.add(root / "pets" / Path(name).with_suffix(".txt"), "1.txt")
    fates = {}
    for given in ("pets", "named.jsonl", "uri.jsonl", "a.parquet", "a.tar"):
        drafts, rejected = read(opened(root / given))
        try:
            found = [media for draft in drafts for media in draft.images]
            for media in found:
                decode_image(media.data)
            fates[given] = found[0].extension if found else rejected[0].reason
        except BadSample as error:
            fates[given] = error.reason
    return fates


@pytest.mark.parametrize(
    ("data", "name", "fate"),
    [
        (AVIF, "a.jpg", "avif"),
        (AVIF, "a.avif", "avif"),
        (AVIF, "a.mp4", "avif"),
        (encoded(pattern(40, 60)), "a.jfif", "jpg"),
        (encoded(pattern(40, 60), "JPEG2000"), "a.png", "jp2"),
        (HEIC_HEAD, "a.jpg", "unreadable_image"),
        (HEIC_HEAD, "a.heic", "unreadable_image"),
        (b"8BPS\0\1" + bytes(50), "a.jpg", "unreadable_image"),
        (b"\xff\x0a" + bytes(50), "a.png", "unreadable_image"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_has_the_same_fate_in_every_input(tmp_path: Path, data: bytes, name: str, fate: str) -> None:
    found = fates(tmp_path, data, name)
    if name.endswith(".mp4"):
        del found["named.jsonl"]  # a name that another field reads
    assert set(found.values()) == {fate}, found


def test_heic_is_read_where_pillow_heif_is_installed() -> None:
    heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    pixels = np.repeat(np.arange(0, 192, 2, dtype=np.uint8)[None], 64, axis=0)[..., None].repeat(3, axis=2)
    heif.from_pillow(Image.fromarray(pixels)).save(buffer, quality=95)
    field, media = as_media(buffer.getvalue(), "a.jpg")
    assert (field, media.extension) == ("images", "heic")
    assert abs(decode_image(media.data).astype(int) - pixels).max() <= 4


def test_heic_is_named_where_pillow_heif_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    reads_heic.cache_clear()
    try:
        with pytest.raises(BadSample, match=r"unreadable_image: .*seems to be HEIC.*pip install -e '.\[heic\]'"):
            decode_image(HEIC_HEAD)
    finally:
        reads_heic.cache_clear()
