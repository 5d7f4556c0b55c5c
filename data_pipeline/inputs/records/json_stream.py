"""The values of a JSON list, one after the other, with constant memory, and where each lies in the file.

    [{"text": "a"}, {"text": "b"}]      values at bytes [1, 14) and [16, 29)

Any range of whole values can be read alone. A window slides over the file; it grows to hold one whole value. Values
without commas between them (several objects in a file, as jq prints them) are read in the same way.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

WINDOW_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\r\n]*")
_AFTER_VALUE = ",]} \t\r\n"
_DECODER = json.JSONDecoder()
_LONGEST_TOKEN = 16  # characters of a literal or escape; an error nearer to the end of the window may be its end alone


@dataclass(frozen=True)
class Value:
    """One value and the bytes that it takes."""

    value: Any
    start: int  # its first byte in the file
    stop: int  # the byte after it


class Window:
    """The part of a file that is being parsed, as text."""

    def __init__(self, file: BinaryIO, start: int, stop: int) -> None:
        file.seek(start)
        self.offset = start  # in the file, of the character at `at`
        self._file, self._left = file, stop - start
        self._text, self._at = "", 0
        self._undecoded = b""  # the beginning of a character whose end is not read
        self._step = WINDOW_BYTES

    def peek(self) -> str:
        """Return the next character that is not white space, without taking it; empty at the end."""
        while True:
            self._take(_SPACE.match(self._text, self._at).end())  # type: ignore[union-attr]  # it matches nothing, too
            if self._at < len(self._text) or not self._grow():
                return self._text[self._at : self._at + 1]

    def skip(self) -> None:
        """Take one character."""
        self._take(self._at + 1)

    def value(self) -> Value:
        """Take one value. Raises ValueError or RecursionError if there is none."""
        self.peek()
        start = self.offset
        while True:
            try:
                found, end = _DECODER.raw_decode(self._text, self._at)
                if self._is_whole(end) or not self._grow():
                    self._take(end)
                    self._step = WINDOW_BYTES
                    return Value(found, start, self.offset)
            except json.JSONDecodeError as error:
                cut_off = error.pos >= len(self._text) - _LONGEST_TOKEN or error.msg.startswith("Unterminated string")
                if not cut_off or not self._grow():
                    raise ValueError(f"{error.msg} at byte {self._offset_of(error.pos)}") from None

    def _is_whole(self, end: int) -> bool:
        """Return whether a value ends here: a number at the end of the window may have more digits."""
        following = self._text[end : end + _LONGEST_TOKEN]
        return len(following) == _LONGEST_TOKEN or (bool(following) and following[0] in _AFTER_VALUE)

    def _take(self, end: int) -> None:
        self.offset, self._at = self._offset_of(end), end

    def _offset_of(self, position: int) -> int:
        if self._text.isascii():
            return self.offset + position - self._at
        return self.offset + len(self._text[self._at : position].encode("utf-8", "surrogatepass"))

    def _grow(self) -> bool:
        """Read more of the file, and forget what was taken. Returns whether there was more."""
        data = self._undecoded + self._file.read(min(self._step, self._left))
        self._left -= len(data) - len(self._undecoded)
        if len(data) == len(self._undecoded):
            if data:
                raise ValueError(f"the file ends within a character of UTF-8, after byte {self.offset}")
            return False
        whole = len(data) - _bytes_of_cut_character(data)
        self._undecoded = data[whole:]
        try:
            text = data[:whole].decode("utf-8", "surrogatepass")
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8: {error.reason}, after byte {self.offset}") from None
        self._text, self._at = self._text[self._at :] + text, 0
        self._step *= 2  # a long value is parsed again each time
        return True


def values(file: BinaryIO, start: int, stop: int, *, commas: bool = True, whole: bool = True) -> Iterator[Value]:
    """Yield the values of a list that lie between two bytes of a file.

    Args:
        file: The file.
        start: The byte after the opening bracket, or the first byte of a value.
        stop: The end of the last value, or of the file.
        commas: Commas separate the values. Else white space does.
        whole: The list must be closed by its bracket, with nothing after it.

    Raises:
        ValueError, RecursionError: It is not JSON.
    """
    window = Window(file, start, stop)
    yield from list_values(window, closed=whole) if commas else _separate_values(window)
    if whole and window.peek():
        raise ValueError(f"more text after the end of the list, at byte {window.offset}")


def list_values(window: Window, *, closed: bool = True) -> Iterator[Value]:
    """Yield the values of a list whose opening bracket is taken, and take its closing bracket."""
    if closed and window.peek() == "]":
        window.skip()
        return
    while True:
        yield window.value()
        following = window.peek()
        if not closed and not following:
            return
        if following not in (",", "]") or not following:
            raise ValueError(f"expecting ',' or ']' at byte {window.offset}")
        window.skip()
        if following == "]":
            return


def _separate_values(window: Window) -> Iterator[Value]:
    while window.peek():
        yield window.value()


def object_lists(window: Window, keys: list[tuple[str, str]]) -> Iterator[str]:
    """Yield the keys of an object whose values are lists. The caller may take the values of the list.

    Args:
        window: At the start of the object.
        keys: Gets every key, with the first character of its value; of a list, also the character after its bracket.

    Raises:
        ValueError, RecursionError: It is not JSON.
    """
    if window.peek() != "{":
        raise ValueError(f"expecting an object at byte {window.offset}")
    window.skip()
    while window.peek() == '"':
        key = window.value().value
        if window.peek() != ":":
            raise ValueError(f"expecting ':' at byte {window.offset}")
        window.skip()
        mark = window.peek()
        if mark == "[":
            window.skip()
            keys.append((key, mark + window.peek()))
            yield key
        else:
            keys.append((key, mark))
            window.value()
        if window.peek() != ",":
            break
        window.skip()
    if window.peek() != "}":
        raise ValueError(f"expecting ',' or a closing brace at byte {window.offset}")
    window.skip()


def first_keys(beginning: bytes) -> list[tuple[str, str]]:
    """Return the keys of the object that a file begins with, each with the beginning of its value, as far as seen.

    first_keys(b'{"version": 1, "data": [{"te')  ->  [("version", "1"), ("data", "[{")]
    """
    window = Window(io.BytesIO(beginning), 0, len(beginning))
    found: list[tuple[str, str]] = []
    with suppress(ValueError, RecursionError):  # the beginning ends somewhere
        for _ in object_lists(window, found):
            for _ in list_values(window):
                pass
    return found


def _bytes_of_cut_character(data: bytes) -> int:
    """Return how many bytes at the end of the data begin a character of UTF-8 whose rest is missing."""
    for length in range(1, min(4, len(data) + 1)):
        byte = data[-length]
        if byte >= 0xC0:
            needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return length if needed > length else 0
        if byte < 0x80:
            return 0
    return 0
