"""Fonts and the characters that each can draw. A font draws an empty box for a character that it lacks."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from matplotlib import font_manager
from matplotlib.ft2font import FaceFlags, FT2Font
from PIL import ImageFont, features

from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.names import files_below

SUFFIXES = (".ttf", ".otf", ".ttc", ".otc")
_CODE_POINTS = 0x110000
_PRIVATE_USE = ((0xE000, 0xF8FF), (0xF0000, 0x10FFFF))
_UNASSIGNED = 0x0378  # a font with a glyph for this code point draws boxes on purpose, as Last Resort does


@dataclass(frozen=True)
class Face:
    """One face of a font file."""

    path: str
    index: int = 0  # of the face in a collection (.ttc)

    def at(self, size: int) -> ImageFont.FreeTypeFont:
        """Return the face at a size in pixels per em, shaped by raqm if Pillow has it."""
        return ImageFont.truetype(self.path, size, index=self.index)

    def covers(self, codes: np.ndarray) -> bool:
        """Return whether the face has a glyph for each of these code points, int64 [n]."""
        return bool((_coverage(self)[codes >> 3] >> (codes & 7) & 1).all())


def find_faces(folder: str) -> tuple[Face, ...]:
    """Return all faces of the scalable Unicode fonts in a folder, by file name.

    Args:
        folder: A folder; "" for the fonts of the system.

    Raises:
        DataError: There are no fonts.
    """
    paths = [str(path) for path in files_below(Path(folder))] if folder else font_manager.findSystemFonts()
    files = sorted(
        (path for path in paths if path.lower().endswith(SUFFIXES)), key=lambda path: (Path(path).name, path)
    )
    faces = tuple(face for path in files for face in _faces(path))
    if not faces:
        where = f"{folder} contains no fonts" if folder else "this machine has no fonts"
        raise DataError(f"{where} ({', '.join(SUFFIXES)}): give a folder of fonts with --set fonts=FOLDER")
    return faces


def choose_face(faces: Sequence[Face], text: str, rng: random.Random) -> Face:
    """Return the first face, in random order, that can draw the whole text.

    Raises:
        BadSample: no_glyph, if no face can.
    """
    codes = code_points(text)
    for face in rng.sample(faces, len(faces)):
        if face.covers(codes):
            return face
    missing = [chr(code) for code in codes if not any(face.covers(np.array([code])) for face in faces)]
    if not missing:
        raise BadSample("no_glyph", f"none of the {len(faces)} fonts has all of its characters")
    shown = ", ".join(f"U+{ord(letter):04X} {unicodedata.name(letter, '')}".strip() for letter in missing[:4])
    raise BadSample("no_glyph", f"none of the {len(faces)} fonts has {shown}")


def code_points(text: str) -> np.ndarray:
    """Return the code points of a text, each once, sorted, without line breaks: int64 [n]."""
    return np.array(sorted({ord(letter) for letter in text if letter != "\n"}), dtype=np.int64)


def needs_shaping(text: str) -> bool:
    """Return whether letters of the text join, reorder or run from right to left. Only raqm draws these correctly."""
    return any(
        unicodedata.bidirectional(letter) in ("R", "AL", "AN") or unicodedata.category(letter) in ("Mn", "Mc")
        for letter in text
    )


def can_shape() -> bool:
    """Return whether Pillow has raqm."""
    return features.check("raqm") is True


@lru_cache(maxsize=1024)
def _faces(path: str) -> tuple[Face, ...]:
    """Return the usable faces of a file."""
    try:
        faces = [Face(path, index) for index in range(FT2Font(path).num_faces)]
        return tuple(face for face in faces if _is_usable(FT2Font(path, face_index=face.index)))
    except (OSError, RuntimeError):  # not a font, in spite of its name
        return ()


def _is_usable(font: FT2Font) -> bool:
    return FaceFlags.SCALABLE in font.face_flags and _UNASSIGNED not in font.get_charmap()


@lru_cache(maxsize=1024)
def _coverage(face: Face) -> np.ndarray:
    """Return which code points the face has a glyph for, one bit each: uint8 [0x110000 / 8].

    Code points of private use count as missing: they mean something else in every font.
    """
    covered = np.zeros(_CODE_POINTS, bool)
    charmap = FT2Font(face.path, face_index=face.index).get_charmap()
    covered[[code for code, glyph in charmap.items() if glyph]] = True  # glyph 0 is the box for a missing character
    for first, last in _PRIVATE_USE:
        covered[first : last + 1] = False
    return np.packbits(covered, bitorder="little")
