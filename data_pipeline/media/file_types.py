r"""What a file is, from its first bytes. Every input asks `file_type`, so that a file is the same thing everywhere.

    file_type(b"\x00\x00\x00\x20ftypavif...")  ->  FileType("AVIF", "image", "avif")     whatever its name is
    file_type(b"%PDF-1.7 ...")                 ->  FileType("PDF", "other")

A name matters only where the bytes say nothing, and among the spellings of one type (jpg, jpeg).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

HEAD_BYTES = 1024  # that file_type looks at


@dataclass(frozen=True)
class FileType:
    """A type of file."""

    name: str  # for messages: "AVIF"
    kind: str  # `image`, `video`, or `other` for what is never part of a sample
    extension: str = ""  # of its files in shards; empty: shards do not hold it
    also: tuple[str, ...] = ()  # other extensions that a file keeps if its name has them


JPEG = FileType("JPEG", "image", "jpg", ("jpeg",))
TIFF = FileType("TIFF", "image", "tif", ("tiff",))
AVIF, HEIC = FileType("AVIF", "image", "avif"), FileType("HEIC", "image", "heic")
JPEG2000 = FileType("JPEG 2000", "image", "jp2")
_ISO_MEDIA = ("mp4", "mov", "m4v", "3gp", "3g2")
MP4 = FileType("MP4", "video", "mp4", _ISO_MEDIA)
MOV, M4V, MOBILE = (FileType(ext.upper(), "video", ext, _ISO_MEDIA) for ext in ("mov", "m4v", "3gp"))
MKV, WEBM = (FileType(name, "video", ext, ("mkv", "webm")) for name, ext in (("Matroska", "mkv"), ("WebM", "webm")))
TRANSPORT_STREAM = FileType("MPEG-TS", "video", "ts")
TIMED_STREAM = FileType("MPEG-TS", "video", "m2ts", ("mts",))

# First bytes -> type. What follows is in the order in which it is tried.
_BEGINNINGS = {
    b"\xff\xd8\xff": JPEG,
    b"\x89PNG\r\n\x1a\n": FileType("PNG", "image", "png"),
    b"GIF8": FileType("GIF", "image", "gif"),
    b"II*\x00": TIFF,
    b"MM\x00*": TIFF,
    b"II+\x00": TIFF,  # BigTIFF
    b"MM\x00+": TIFF,
    b"\x00\x00\x00\x0cjP  \r\n\x87\n": JPEG2000,
    b"\xff\x4f\xff\x51": FileType("JPEG 2000", "image", "j2k"),
    b"\x00\x00\x01\x00": FileType("ICO", "image", "ico"),
    b"FLV\x01": FileType("FLV", "video", "flv"),
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11": FileType("ASF", "video", "wmv", ("asf",)),
    b"\x00\x00\x01\xba": FileType("MPEG", "video", "mpg", ("mpeg", "vob")),
    # Not read: named, so that a message can say what the file is.
    b"\x00\x00\x00\x0cJXL \r\n\x87\n": FileType("JPEG XL", "other"),
    b"\xff\x0a": FileType("JPEG XL", "other"),
    b"8BPS": FileType("PSD", "other"),
    b"%PDF": FileType("PDF", "other"),
    b"%!PS": FileType("EPS", "other"),
    b"\xc5\xd0\xd3\xc6": FileType("EPS", "other"),
    b"DDS ": FileType("DDS", "other"),
    b"qoif": FileType("QOI", "other"),
    b"icns": FileType("ICNS", "other"),
    b"\x76\x2f\x31\x01": FileType("OpenEXR", "other"),
    b"#?RADIANCE": FileType("Radiance HDR", "other"),
    b"\x89HDF\r\n\x1a\n": FileType("HDF5", "other"),
    b"\xd7\xcd\xc6\x9a": FileType("WMF", "other"),
    b"\x00\x00\x02\x00": FileType("a Windows cursor", "other"),
    b"\x00\x00\x01\xb3": FileType("an MPEG stream without a container", "other"),
    b"\x93NUMPY": FileType("NumPy", "other"),
    b"OTTO": FileType("a font", "other"),
    b"fLaC": FileType("audio", "other"),
    b"ID3": FileType("audio", "other"),
    b"MThd": FileType("audio", "other"),
    b"PK\x03\x04": FileType("a ZIP archive", "other"),
    b"\x1f\x8b": FileType("gzip", "other"),
    b"7z\xbc\xaf\x27\x1c": FileType("a 7-Zip archive", "other"),
    b"Rar!": FileType("a RAR archive", "other"),
    b"PAR1": FileType("Parquet", "other"),
    b"ARROW1": FileType("Arrow", "other"),
    b"version https://git-lfs": FileType("a Git LFS pointer", "other"),
}
_RIFF_TYPES = {
    b"WEBP": FileType("WebP", "image", "webp"),
    b"AVI ": FileType("AVI", "video", "avi"),
    b"WAVE": FileType("audio", "other"),
}
# Brands of an ISO container (ISO 14496-12), most telling first: a file names one main brand and some compatible ones.
_BRANDS = {
    b"avif": AVIF,
    b"avis": AVIF,
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"), HEIC),
    b"mif1": HEIC,
    b"msf1": HEIC,
    b"jxl ": FileType("JPEG XL", "other"),
    b"jp2 ": JPEG2000,
    b"jpx ": JPEG2000,
    b"crx ": FileType("a raw photograph (CR3)", "other"),
    b"M4A ": FileType("audio", "other"),
    b"M4B ": FileType("audio", "other"),
    b"M4P ": FileType("audio", "other"),
    b"qt  ": MOV,
    b"M4V ": M4V,
    b"M4VH": M4V,
    b"M4VP": M4V,
}
_STILL = (AVIF, HEIC)
# A file without ftyp begins with one of these boxes. The small ones may be words of a text, where no byte is zero.
_QUICKTIME_BOXES, _SMALL_BOXES = (b"moov", b"mdat"), (b"wide", b"free", b"skip", b"pnot")
_NETPBM = {b"1": "pbm", b"4": "pbm", b"2": "pgm", b"5": "pgm", b"3": "ppm", b"6": "ppm"}
_NETPBM_HEAD = re.compile(rb"P([1-6])[\s#]+(#[^\n]*\n\s*)*\d")
_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)  # bytes of the header after the first 14
# Beginnings of text, after white space and a byte order mark; without regard to case. The groups (?>...) are atomic:
# otherwise the time would double with every comment at the beginning of a file.
_XML_START = rb"(?><\?xml[^<]*)?(?><!--.*?-->\s*)*+"
_TEXTS = (
    (re.compile(_XML_START + rb"(<!doctype svg|<svg)", re.DOTALL), "SVG"),
    (re.compile(_XML_START + rb"(<!doctype html|<html|<head)", re.DOTALL), "a web page"),
    (re.compile(rb"<\?xml"), "XML"),
)
_TEXT_TYPES = {name: FileType(name, "other") for _, name in _TEXTS}


def file_type(data: bytes) -> FileType | None:
    """Return the type that the content of a file has. None: its first bytes are those of no known type."""
    head = data[:HEAD_BYTES]
    for beginning, found in _BEGINNINGS.items():
        if head.startswith(beginning):
            return found
    for detect in (_riff, _iso_media, _matroska, _ogg, _transport_stream, _bitmap, _text):
        if (detected := detect(head)) is not None:
            return detected
    return None


def describe(data: bytes) -> str:
    """Say what a file seems to be, for messages about one that is not what it should be."""
    if not data:
        return "the file is empty"
    found = file_type(data)
    return f"it seems to be {found.name}, {len(data):,} bytes" if found else f"{len(data):,} bytes"


def _riff(head: bytes) -> FileType | None:
    return _RIFF_TYPES.get(head[8:12]) if head[:4] == b"RIFF" else None


def _iso_media(head: bytes) -> FileType | None:
    """Return the type of an ISO container: of its main brand if that decides, else of its compatible brands."""
    if head[4:8] != b"ftyp":
        is_small = head[:1] == b"\0" and head[4:8] in _SMALL_BOXES
        return MOV if is_small or head[4:8] in _QUICKTIME_BOXES else None
    end = min(int.from_bytes(head[:4], "big"), len(head))
    main, others = head[8:12], {head[at : at + 4] for at in range(16, end, 4)}
    if main in (b"mif1", b"msf1"):  # an image, whose codec a compatible brand names
        return next((found for brand, found in _BRANDS.items() if brand in others and found in _STILL), HEIC)
    if main in _BRANDS:
        return _BRANDS[main]
    if main[:2] in (b"3g", b"kd"):
        return MOBILE
    if main == b"\0\0\0\0" or not main.strip():
        return MOV
    # Some writers name a still image's brand only among the compatible ones; a video has a video's brand as well.
    videos = {b"isom", b"iso2", b"mp41", b"mp42", b"avc1"}
    still = next((found for brand, found in _BRANDS.items() if brand in others and found in _STILL), None)
    return still if still is not None and not (videos & (others | {main})) else MP4


def _matroska(head: bytes) -> FileType | None:
    if not head.startswith(b"\x1aE\xdf\xa3"):
        return None
    return WEBM if b"\x42\x82\x84webm" in head[:128] else MKV


def _ogg(head: bytes) -> FileType | None:
    if not head.startswith(b"OggS"):
        return None
    video = any(word in head for word in (b"\x80theora", b"BBCD\0", b"\x01video\0", b"OVP80"))
    return FileType("Ogg", "video", "ogv", ("ogm",)) if video else FileType("audio", "other")


def _transport_stream(head: bytes) -> FileType | None:
    """MPEG-TS: packets of 188 bytes that begin with 0x47; of 192 bytes in .m2ts files, after four bytes of time."""
    for start, length, found in ((0, 188, TRANSPORT_STREAM), (4, 192, TIMED_STREAM)):
        packets = range(start, len(head) - 4, length)
        # The fourth byte says whether a packet has content: no packet has neither content nor an adaptation field.
        if len(packets) >= 3 and all(head[at] == 0x47 and head[at + 3] & 0x30 for at in packets):
            return found
    return None


def _bitmap(head: bytes) -> FileType | None:
    """BMP, DIB (a BMP without its first 14 bytes) and the Netpbm formats. Their marks are short: more is checked."""
    if head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return FileType("BMP", "image", "bmp")
    if int.from_bytes(head[:4], "little") in _BMP_HEADERS[2:] and head[12:14] == b"\x01\x00":
        return FileType("DIB", "image", "dib")
    if found := _NETPBM_HEAD.match(head):
        return FileType("Netpbm", "image", _NETPBM[found[1]], ("pnm",))
    return FileType("PFM", "image", "pfm") if re.match(rb"P[Ff]\s+\d+\s+\d+\s+-?[\d.]+\s", head) else None


def _text(head: bytes) -> FileType | None:
    begun = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((_TEXT_TYPES[name] for pattern, name in _TEXTS if pattern.match(begun)), None)
