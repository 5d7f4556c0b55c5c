"""The fields of records, and columns of tables, that hold images, videos and texts, by their names.

    {"img": "cat.jpg", "captions": ["A cat.", "An animal."]}
    -> image_text "A cat." and image_text "An animal.", each with cat.jpg

A name is used where one reading is plausible. Otherwise the message asks for the option that decides.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Literal, TypeVar

from data_pipeline.errors import BadSample
from data_pipeline.inputs.media import CODE_SUFFIXES, EXTENSIONS, guess_domain

Captions = Literal["all", "first", "random"]  # which of several captions of a record become samples
NOT_CHOSEN, WITHOUT_TEXT = "caption not chosen", "caption without text"  # names of counts
_T = TypeVar("_T")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Number of the caption, or 0; the record with its text and domain; what of its texts is omitted, by name
Texted = tuple[int, dict[str, Any], dict[str, int]]

OPTIONS = {"images": "image", "videos": "video"}  # field of a record -> the option that names it
TEXT_NAMES = _words(
    "text caption captions prompt description descriptions ocr ocr_text txt content recaption recaptions alt_text "
    "long_caption short_caption detailed_caption dense_caption generated_caption blip_caption raw_caption "
    "caption_text image_caption video_caption"
)
_CERTAIN_TEXTS = _words("text txt caption captions recaption recaptions ocr ocr_text")
_ANSWER_NAMES = _words("answer answers response responses output completion solution target chosen")
TEXTS_ALONE = frozenset(("text", "txt", "content"))  # names of texts that need no image; others are captions
_NUMBER = re.compile(r"_?(\d+)$")
# Names of one or several files. An s or a number may follow: images, image_1, image_2.
_NAMES = {
    "images": _words(
        "image img jpg jpeg png webp photo pic screenshot page_image left right left_image right_image image_left "
        "image_right image_bytes image_data image_base64 image_base64_str base64"
    )
    | frozenset(("picture",)),
    "videos": _words("video mp4 clip movie video_bytes video_data"),
}
# Names of paths, such as img_path, which are used if none of the names above exists.
_PATH = re.compile(r"(.*?)_?(path|file|name)s?")
_FILE_NAMES = _words("file_name filename file filepath file_path path")  # of an image or of a video
URL_NAMES = _words(
    "url urls image_url image_urls img_url img_urls video_url video_urls image_link link photo_image_url contenturl"
)
LINK_NAMES = frozenset(("url", "urls", "link"))  # of a chat or document: where it was found
# Names that say that a URL beside a text is that of a web page, or that of an image.
_PAGE_NAMES = _words(
    "timestamp dump date file_path language language_score token_count warc warc_date warc_record_id crawl "
    "language_probability cc_dump snapshot domain_name"
)
_IMAGE_HINTS = _words(
    "width height original_width original_height similarity clip_similarity nsfw punsafe pwatermark aesthetic "
    "aesthetic_score sha256 face_bboxes image_phash image_id hash"
)
# A path that ends in .ts may be that of a program.
_FIELDS = {
    extension: field
    for field, extensions in EXTENSIONS.items()
    for extension in extensions
    if f".{extension}" not in CODE_SUFFIXES
}
_LONGEST_SUFFIX = 1 + max(map(len, _FIELDS))  # characters, with the dot
_LONGEST_PATH = 4096  # characters
_PAIRS = (("left", "right"), ("left_image", "right_image"), ("image_left", "image_right"))


def media_names(names: Iterable[str], field: str) -> list[str]:
    """Return the names under which images (field `images`) or videos (`videos`) are looked for, in their order."""
    return [name for name in names if _holds_files(name, field)]


def path_names(names: Iterable[str], field: str) -> list[str]:
    """Return the names under which paths of images or videos are looked for if no other name is found."""
    return [name for name in names if _holds_paths(name, field)]


def file_names(names: Iterable[str]) -> list[str]:
    """Return the names under which paths of any file are looked for if no other name is found."""
    return [name for name in names if name.lower() in _FILE_NAMES]


def text_names(names: Iterable[str]) -> list[str]:
    """Return the names under which texts are looked for.

    A prompt or description beside an answer is perhaps a question: then the answer is among them.
    """
    names = list(names)
    found = [name for name in names if _stem(name) in TEXT_NAMES]
    if found and not any(_stem(name) in _CERTAIN_TEXTS for name in found):
        found += [name for name in names if name.lower() in _ANSWER_NAMES]
    return found


def in_order(names: Sequence[str]) -> list[str] | None:
    """Return the names in the order of their files; None if they do not say which comes first.

    ["image_2", "image_1"] -> ["image_1", "image_2"]
    ["right", "left"] -> ["left", "right"]
    ["image", "mask"] -> None
    """
    if len(names) <= 1:
        return list(names)
    stems = {_stem(name) for name in names}
    numbers = [match[1] if (match := _NUMBER.search(name)) else "" for name in names]
    if len(stems) == 1 and all(numbers) and len(set(map(int, numbers))) == len(names):
        return sorted(names, key=lambda name: int(numbers[list(names).index(name)]))
    lowered = {name.lower(): name for name in names}
    pair = next((pair for pair in _PAIRS if set(pair) == lowered.keys()), None)
    return [lowered[name] for name in pair] if pair else None


def url_names(names: Iterable[str]) -> list[str]:
    """Return the names that hold URLs of images or videos, as far as names can say."""
    names = list(names)
    lowered = {name.lower() for name in names}
    found = [name for name in names if name.lower() in URL_NAMES]
    of_pages = {name.lower() for name in found} == {"url"} and "text" in lowered
    return [] if of_pages and lowered & _PAGE_NAMES and not lowered & _IMAGE_HINTS else found


def with_texts(
    record: dict[str, Any], name: str, counts: tuple[int, int], captions: Captions, origin: str
) -> Iterator[Texted]:
    """Yield the record with its text under `text` and a domain: once, or once for each of its captions.

    Args:
        record: The record, without its images and videos.
        name: Its field with the text, or a list of captions.
        counts: The numbers of its images and videos.
        captions: Which of its captions become samples.
        origin: Where it comes from.

    Raises:
        BadSample: It has no text.
    """
    texts = record.get(name)
    rest = {key: value for key, value in record.items() if key not in (name, "text")}
    unread = ["messages"] if name == "text" else ["text", "messages"]
    replaced = {f"field {field}": 1 for field in unread if record.get(field)}
    if not isinstance(texts, list):
        yield 0, complete({**rest, "text": text_of_ground_truth(texts)}, counts), replaced
        return
    chosen = choose_captions(texts, captions, origin)
    written = sum(bool(text.strip()) for text in texts)
    numbers = {**replaced, NOT_CHOSEN: written - len(chosen), WITHOUT_TEXT: len(texts) - written}
    for number, text in enumerate(chosen, start=1):
        omitted = {name: count for name, count in numbers.items() if count and number == len(chosen)}
        yield number if len(chosen) > 1 else 0, complete({**rest, "text": text}, counts), omitted


def text_of_ground_truth(text: Any) -> Any:
    """Return the text in Donut's and SynthDoG's {"gt_parse": {"text_sequence": ...}}; any other value unchanged."""
    if not isinstance(text, str) or not text.startswith('{"gt_parse'):
        return text
    try:
        sequence = json.loads(text)["gt_parse"]["text_sequence"]
    except (ValueError, KeyError, TypeError, RecursionError):  # a form's fields are learned as they are written
        return text
    return sequence if isinstance(sequence, str) else text


def choose_captions(texts: Sequence[Any], captions: Captions, origin: str) -> list[str]:
    """Return the captions of one record that become samples. `random` depends on `origin` alone.

    Raises:
        BadSample: bad_record or no_caption.
    """
    if any(isinstance(text, dict) and {"start", "end"} & text.keys() for text in texts):
        raise BadSample("bad_record", "captions with times: use --kind clips")
    if not all(isinstance(text, str) for text in texts):
        raise BadSample("bad_record", "a list of captions must hold texts only")
    written = [text for text in texts if text.strip()]
    if not written:
        raise BadSample("no_caption", "its list of captions is empty")
    return choose(written, captions, origin)


def choose(captions: Sequence[_T], which: Captions, origin: str) -> list[_T]:
    """Return the captions, or the records with one each, that become samples. `random` depends on `origin` alone."""
    if which == "all":
        return list(captions)
    return [captions[zlib.crc32(origin.encode(errors="replace")) % len(captions) if which == "random" else 0]]


def without_null_domain(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record without a `domain` of null, which means that it names none."""
    if "domain" in record and record["domain"] is None:
        return {key: value for key, value in record.items() if key != "domain"}
    return record


def complete(record: dict[str, Any], counts: tuple[int, int], domain: str = "") -> dict[str, Any]:
    """Return a record that names no domain with one: the given one, or from its text and its images and videos.

    Several images of a text without placeholders come before it, in their order.
    """
    text = record["text"]
    if "domain" in record:
        return record
    guessed = domain or guess_domain(*counts)
    if not isinstance(text, str):
        return {**record, "domain": guessed}
    has_placeholders = "<image>" in text or "<video>" in text
    if has_placeholders and not domain and guessed in ("image_text", "video"):
        guessed = "interleaved"
    elif not has_placeholders and guessed == "interleaved":
        text = "<image>" * counts[0] + "<video>" * counts[1] + text
    return {**record, "domain": guessed, "text": text}


def check_no_messages(record: dict[str, Any]) -> None:
    """Check that a record of a domain of texts is not a conversation. Raises BadSample."""
    name = next((name for name in ("messages", "conversations") if name in record), "")
    if name and record.get("domain", "chat") != "chat" and not isinstance(record.get("text"), str):
        raise BadSample(
            "bad_record", f'"{name}" with the domain {str(record["domain"])[:40]!r}: a conversation has domain chat'
        )


def as_list(value: Any) -> list[Any]:
    """Return the values of a field: of a list, its entries; of null or an empty text, none."""
    if value is None or value == "":
        return []
    return value if isinstance(value, list) else [value]


def looks_like_file(value: Any) -> str:
    """Return "images" or "videos" if a value is certainly the path of such a file, else an empty string."""
    if not isinstance(value, str):
        return ""
    field = (
        _FIELDS.get(value[-_LONGEST_SUFFIX:].rpartition(".")[2].lower(), "") if "." in value[-_LONGEST_SUFFIX:] else ""
    )
    return field if field and len(value) <= _LONGEST_PATH and "\n" not in value and "://" not in value else ""


@lru_cache(maxsize=1 << 14)  # records of a set have the same names
def _holds_files(name: str, field: str) -> bool:
    return not {_stem(name), _stem(name).removesuffix("s")}.isdisjoint(_NAMES[field])


@lru_cache(maxsize=1 << 14)
def _holds_paths(name: str, field: str) -> bool:
    match = _PATH.fullmatch(_stem(name))
    return match is not None and match[1] in _NAMES[field]


@lru_cache(maxsize=1 << 14)
def _stem(name: str) -> str:
    """Return a name in lower case without the number at its end, which is a part of some (mp4)."""
    name = name.lower()
    return name if any(name in names for names in _NAMES.values()) else _NUMBER.sub("", name) or name
