"""Rendered text: images compared with their records, and fonts compared with fontTools."""

from __future__ import annotations

import io
import random
import re
import shutil
import unicodedata
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont, features

from data_pipeline.domains import build_sample
from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.draft import Draft, Rejected
from data_pipeline.inputs.ocr.compositing import Compositing, compose, readable_colour
from data_pipeline.inputs.ocr.fonts import Face, choose_face, find_faces
from data_pipeline.inputs.ocr.rendered_text import TEXT_BYTES_PER_UNIT, RenderedText, paragraphs_of
from data_pipeline.inputs.ocr.typesetting import NOT_FIRST, TextMask, clean, draw_lines, wrap
from tests import prose

ENGLISH = prose.text()[-3000:]
CHINESE = "人工智能是研究、开发用于模拟、延伸和扩展人的智能的理论、方法、技术及应用系统的一门新的技术科学。"
JAPANESE = "東京は日本の首都である。「こんにちは」と彼は言った。コンピューター、ゲーム。"
ARABIC = "مرحبا بالعالم، هذا نص عربي قصير للتجربة."
HINDI = "नमस्ते दुनिया"
DEJAVU = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"


@pytest.fixture
def latin_fonts(tmp_path: Path) -> str:
    """A folder of fonts without Chinese characters, and a damaged one."""
    (tmp_path / "fonts").mkdir()
    for name in ("DejaVuSans.ttf", "DejaVuSerif.ttf"):
        shutil.copy(DEJAVU.with_name(name), tmp_path / "fonts")
    (tmp_path / "fonts/broken.ttf").write_bytes(b"not a font")
    return str(tmp_path / "fonts")


def text_file(folder: Path, text: str | bytes) -> str:
    path = folder / "text.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def read(given: RenderedText) -> tuple[list[Draft], list[Rejected]]:
    """Return all drafts and rejections."""
    found = [outcome for unit in given.units() for outcome in given.read(unit)]
    return [x for x in found if isinstance(x, Draft)], [x for x in found if isinstance(x, Rejected)]


def grey_image(draft: Draft) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(draft.images[0].data)).convert("L")).astype(float)


# --- fonts ------------------------------------------------------------------------------------------------------------


def test_faces_cover_the_code_points_that_fonttools_finds() -> None:
    faces = find_faces("")
    assert len(faces) > 10
    rng = random.Random(0)
    codes = [rng.randrange(0x20, 0xE000) for _ in range(3000)] + [0x4E2D, 0x41, 0x1F600]
    for face in (faces[0], faces[-1], next(face for face in faces if face.index)):
        cmap = TTFont(face.path, fontNumber=face.index, lazy=True).getBestCmap()
        assert [face.covers(np.array([code])) for code in codes] == [code in cmap for code in codes]


def test_no_character_is_drawn_as_an_empty_box(tmp_path: Path) -> None:
    """Each character of each sample differs from the box that its font draws for a missing character."""
    given = RenderedText((text_file(tmp_path, "\n".join([CHINESE, "Ωμέγα ﬁ Привет", ARABIC, "naïve café"])),), "line")
    drafts, rejected = read(given)
    assert not rejected
    paths = {(Path(face.path).name, face.index): face for face in find_faces("")}
    for draft in drafts:
        name, index = draft.record["font"].split("#")
        font = paths[name, int(index)].at(40)
        box = font.getmask("\u0378").getbbox(), bytes(font.getmask("\u0378"))
        for letter in set(draft.record["text"]) - {" ", "\n"}:
            glyph = font.getmask(letter)
            assert (glyph.getbbox(), bytes(glyph)) != box, (draft.record["font"], letter)


def test_a_font_with_all_characters_is_chosen_or_the_text_is_rejected(tmp_path: Path, latin_fonts: str) -> None:
    path = text_file(tmp_path, f"Plain English.\n{CHINESE}\nMore English, {HINDI}.\nThe end.")
    drafts, rejected = read(RenderedText((path,), fonts=latin_fonts))
    assert [draft.record["text"] for draft in drafts] == ["Plain English.", "The end."]
    assert [sample.reason for sample in rejected] == ["no_glyph", "no_glyph"]
    assert "U+4E00 CJK UNIFIED IDEOGRAPH-4E00" in rejected[0].detail
    both = (*find_faces(latin_fonts), next(face for face in find_faces("") if "CJK" in face.path))
    assert {choose_face(both, CHINESE, random.Random(seed)) for seed in range(20)} == {both[-1]}
    assert len({choose_face(both, "plain", random.Random(seed)) for seed in range(20)}) == 3
    with pytest.raises(BadSample, match="none of the 3 fonts has all of its characters"):
        choose_face(both, "中ب", random.Random(0))  # each is in one of the fonts
    with pytest.raises(DataError, match="contains no fonts"):
        find_faces(str(tmp_path / "nothing"))


def test_scripts_that_need_shaping_are_rejected_without_raqm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = RenderedText((text_file(tmp_path, f"{ARABIC}\nEnglish"),))
    assert features.check("raqm")
    assert [draft.record["text"] for draft in read(given)[0]] == [ARABIC, "English"]
    monkeypatch.setattr(features, "check", lambda feature: False)
    drafts, rejected = read(given)
    assert [draft.record["text"] for draft in drafts] == ["English"]
    assert [sample.reason for sample in rejected] == ["needs_shaping"]


# --- lines ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [ENGLISH, CHINESE * 5, JAPANESE * 5, f"{CHINESE} and {'longword' * 40} {JAPANESE}"])
def test_wrapped_lines_fit_and_contain_the_whole_text(text: str) -> None:
    text = clean(text)
    font = next(face for face in find_faces("") if "CJK" in face.path).at(20)
    for width in (45, 200, 611):
        lines = list(wrap(text, font, width))
        assert all(font.getlength(line) <= width for line, _ in lines)
        assert "".join(line for line, _ in lines).replace(" ", "") == text.replace(" ", "")
        used = [0, *(end for _, end in lines)]
        assert [text[a:b].strip() for a, b in pairwise(used)] == [line for line, _ in lines]
        if width > 100:
            assert not [line for line, _ in lines if line[0] in NOT_FIRST and line[0] not in ".:,;"]


def test_clean_composes_letters_and_removes_control_characters() -> None:
    assert clean(" A\u0301 \t\u00a0b\u200bc\x07\u202ed\ufeff ") == "Á bcd"
    assert (
        clean("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645") == "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"
    )


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("angle", "slack"), [(0.0, 0), (3.0, 2), (-11.0, 2)])
def test_glyphs_are_in_the_recorded_boxes_only(angle: float, slack: int) -> None:
    font = Face(str(DEJAVU)).at(28)
    text = draw_lines(["The quick", "", "brown fox", "jumps."], font, pitch=40, align="centre")
    for x1, y1, x2, y2 in text.boxes:  # each box is tight
        assert text.mask.crop((int(x1), int(y1), int(x2), int(y2))).getbbox() == (0, 0, x2 - x1, y2 - y1)
    empty = TextMask(Image.new("L", text.mask.size), text.boxes)
    options = Compositing(margin=9, angle=angle, contrast=4.0, blur=0, quality=None)
    for seed in range(4):
        media, boxes = compose(text, options, random.Random(seed))
        background, _ = compose(empty, options, random.Random(seed))
        with_text, bare = (np.asarray(Image.open(io.BytesIO(item.data))).astype(int) for item in (media, background))
        glyphs = np.abs(with_text - bare).max(axis=-1) > 8 * bool(angle)
        assert len(boxes) == 3
        outside = glyphs.copy()
        for x1, y1, x2, y2 in boxes:
            outside[max(y1 - slack, 0) : y2 + slack, max(x1 - slack, 0) : x2 + slack] = False
        assert glyphs.any()
        assert not outside.any()


def test_text_has_the_contrast_with_every_pixel_of_its_background() -> None:
    def linear(level: float) -> float:
        return level / 12.92 if level <= 0.04045 else ((level + 0.055) / 1.055) ** 2.4

    def luminance(rgb: tuple[int, ...]) -> float:
        red, green, blue = (linear(value / 255) for value in rgb)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    rng = random.Random(3)
    for contrast in (3.0, 4.5, 7.0, 15.0):
        for _ in range(6):
            spread = rng.choice((1, 60, 256))
            background = np.frombuffer(rng.randbytes(8 * 9 * 3), np.uint8).reshape(8, 9, 3).astype(int)
            background = background % spread + (256 - spread) // 2
            colour, faded = readable_colour(background.astype(np.uint8), contrast, rng)
            for pixel in {tuple(pixel) for pixel in faded.reshape(-1, 3).tolist()}:
                bright, dark = sorted((luminance(pixel), luminance(colour)), reverse=True)
                assert (bright + 0.05) / (dark + 0.05) >= contrast - 1e-9


@pytest.mark.parametrize("text", ["The assert statement", CHINESE[:12], ARABIC, "Привет, мир: Ωμέγα"])
def test_the_record_contains_the_text_of_the_image(tmp_path: Path, text: str) -> None:
    """Pillow alone draws the text of the record: the pixels correlate. They do not for the reversed text."""
    given = RenderedText(
        (text_file(tmp_path, text),), "line", max_rotation=0, max_blur=0, image_format="png", min_font_size=30
    )
    (draft, *_), _ = read(given)
    name, index = draft.record["font"].split("#")
    path = next(face.path for face in find_faces("") if Path(face.path).name == name)
    font = ImageFont.truetype(path, draft.record["font_size"], index=int(index))
    ((x1, y1, x2, y2),) = draft.record["line_boxes"]
    image = grey_image(draft)[y1:y2, x1:x2]

    def correlation(words: str) -> float:
        canvas = Image.new("L", (4000, 300))
        ImageDraw.Draw(canvas).text((100, 100), words, 255, font)
        glyphs = np.asarray(canvas.crop(canvas.getbbox()))
        if glyphs.shape != image.shape:
            return 0.0
        return abs(float(np.corrcoef(glyphs.ravel(), image.ravel())[0, 1]))

    assert correlation(draft.record["text"]) > 0.9
    assert correlation(draft.record["text"][::-1]) < 0.8


# --- the input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["line", "paragraph", "page"])
def test_the_whole_text_is_drawn_once(tmp_path: Path, layout: str) -> None:
    text = "\n".join([ENGLISH[:600], CHINESE * 3, JAPANESE, ARABIC, "x" * 300, ENGLISH[600:900]])
    drafts, rejected = read(RenderedText((text_file(tmp_path, text),), layout, max_font_size=16))  # type: ignore[arg-type]
    assert not rejected
    rendered = "".join(draft.record["text"] for draft in drafts)
    assert re.sub(r"\s", "", rendered) == re.sub(r"\s", "", unicodedata.normalize("NFC", text))
    for draft in drafts:
        lines = [line for line in draft.record["text"].split("\n") if line]
        assert len(lines) == len(draft.record["line_boxes"])
        assert len(lines) == 1 or layout != "line"
        height, width = grey_image(draft).shape
        for x1, y1, x2, y2 in draft.record["line_boxes"]:
            assert 0 <= x1 < x2 <= width
            assert 0 <= y1 < y2 <= height
        assert build_sample(draft.record, images=1, videos=0).domain == "ocr"


@pytest.mark.parametrize("newline", ["\n", " "])
def test_units_divide_a_file_without_loss(tmp_path: Path, newline: str) -> None:
    """With characters of three bytes, in many lines and in a single one."""
    words = [f"世{number:04d}界" for number in range(16000)]
    given = RenderedText((text_file(tmp_path, newline.join(words)),), "page", max_font_size=8, min_font_size=8)
    units = given.units()
    assert len(units) == 3
    assert all(unit.stop - unit.start <= TEXT_BYTES_PER_UNIT for unit in units)
    read_back = [paragraph for unit in units for _, paragraph in paragraphs_of(unit)]
    assert "".join(map(str, read_back)).replace(" ", "") == "".join(words)


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    path = text_file(tmp_path, f"{ENGLISH[:250]}\n{CHINESE}")
    (tmp_path / "images").mkdir()
    Image.fromarray(np.indices((200, 300)).sum(axis=0).astype(np.uint8)).save(tmp_path / "images/a.png")
    (tmp_path / "images/b.jpg").write_bytes(b"damaged")
    first = RenderedText((path,), backgrounds=str(tmp_path / "images"))
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    second = RenderedText((str(shutil.copy(path, str(moved))),), backgrounds=str(tmp_path / "images"))
    assert read(first) == read(first) == read(second)
    other = read(RenderedText((path,), seed=1, backgrounds=str(tmp_path / "images")))
    assert [draft.images[0].data for draft in other[0]] != [draft.images[0].data for draft in read(first)[0]]


def test_invalid_options_are_errors_and_bad_texts_are_rejected(tmp_path: Path) -> None:
    drafts, rejected = read(RenderedText((text_file(tmp_path, b"good\n\xff\xfe bad\n\n\xef\xbb\xbfgood too\n"),)))
    assert [draft.record["text"] for draft in drafts] == ["good", "good too"]
    assert [sample.reason for sample in rejected] == ["bad_text"]
    with pytest.raises(DataError, match="contrast=30"):
        RenderedText(("x",), contrast=30)
    with pytest.raises(DataError, match="min_font_size=50"):
        RenderedText(("x",), min_font_size=50)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no text files"):
        RenderedText((str(tmp_path / "empty"),)).units()
    drafts, rejected = read(RenderedText((text_file(tmp_path, "\u2800\u2800\nseen"),)))  # blank braille patterns
    assert [draft.record["text"] for draft in drafts] == ["seen"]
    assert [sample.reason for sample in rejected] == ["blank_text"]
    with pytest.raises(DataError, match="contains no images"):
        read(RenderedText((text_file(tmp_path, "x"),), backgrounds=str(tmp_path / "empty")))
