"""Fonts, and what each of them can draw: no letter that a font lacks may be drawn as an empty box."""

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
_UNASSIGNED = 0x0378  # a font that has a glyph for it, such as Last Resort, draws boxes on purpose


@dataclass(frozen=True)
class Face:
    """One face of a font file; collections (.ttc) hold several."""

    path: str
    index: int = 0

    def at(self, size: int) -> ImageFont.FreeTypeFont:
        """The face at so many pixels an em, shaped by raqm where Pillow has it."""
        return ImageFont.truetype(self.path, size, index=self.index)

    def covers(self, codes: np.ndarray) -> bool:
        """Whether it has a glyph for each of these code points."""
        return bool((_coverage(self)[codes >> 3] >> (codes & 7) & 1).all())


def find_faces(folder: str) -> tuple[Face, ...]:
    """All faces of the scalable Unicode fonts in a folder, or of the system's where the folder is "", by file name.

    Raises DataError if there is none.
    """
    paths = [str(path) for path in files_below(Path(folder))] if folder else font_manager.findSystemFonts()
    files = sorted(
        (path for path in paths if path.lower().endswith(SUFFIXES)), key=lambda path: (Path(path).name, path)
    )
    faces = tuple(face for path in files for face in _faces(path))
    if not faces:
        where = f"{folder} holds no fonts" if folder else "this machine has no fonts"
        raise DataError(f"{where} ({', '.join(SUFFIXES)}): give a folder of them with --set fonts=FOLDER")
    return faces


def choose_face(faces: Sequence[Face], text: str, order: random.Random) -> Face:
    """The first face, in an order drawn anew, that can draw the whole text. Raises BadSample `no_glyph`."""
    codes = code_points(text)
    for face in order.sample(faces, len(faces)):
        if face.covers(codes):
            return face
    lacking = [chr(code) for code in codes if not any(face.covers(np.array([code])) for face in faces)]
    shown = ", ".join(f"U+{ord(letter):04X} {unicodedata.name(letter, '')}".strip() for letter in lacking[:4])
    said = (
        f"none of {len(faces)} fonts has {shown}" if lacking else f"no one of {len(faces)} fonts has all of its letters"
    )
    raise BadSample("no_glyph", said)


def code_points(text: str) -> np.ndarray:
    """The code points of a text that must be drawn, each once, in order; line breaks are none."""
    return np.array(sorted({ord(letter) for letter in text if letter != "\n"}), dtype=np.int64)


def needs_shaping(text: str) -> bool:
    """Whether letters of the text join, reorder or run leftward, which only raqm draws rightly."""
    return any(
        unicodedata.bidirectional(letter) in ("R", "AL", "AN") or unicodedata.category(letter) in ("Mn", "Mc")
        for letter in text
    )


def can_shape() -> bool:
    """Whether Pillow has raqm."""
    return features.check("raqm") is True


@lru_cache(maxsize=1024)
def _faces(path: str) -> tuple[Face, ...]:
    """The usable faces of a file: those with outlines that draw no box on purpose."""
    try:
        faces = [Face(path, index) for index in range(FT2Font(path).num_faces)]
        return tuple(face for face in faces if _usable(FT2Font(path, face_index=face.index)))
    except (OSError, RuntimeError):  # no font, whatever its name
        return ()


def _usable(font: FT2Font) -> bool:
    return FaceFlags.SCALABLE in font.face_flags and _UNASSIGNED not in font.get_charmap()


@lru_cache(maxsize=1024)
def _coverage(face: Face) -> np.ndarray:
    """Which code points the face's character map has, a bit each: uint8 [0x110000 / 8]. Not those of private use, which
    mean something else in every font."""
    covered = np.zeros(_CODE_POINTS, bool)
    charmap = FT2Font(face.path, face_index=face.index).get_charmap()
    covered[[code for code, glyph in charmap.items() if glyph]] = True  # glyph 0 is the box for what is missing
    for first, last in _PRIVATE_USE:
        covered[first : last + 1] = False
    return np.packbits(covered, bitorder="little")
