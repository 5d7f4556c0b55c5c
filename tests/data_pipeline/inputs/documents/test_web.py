"""Web pages and Markdown: the text that a reader sees, in order, and only images that may be read."""

from __future__ import annotations

import base64
import os
import re
from pathlib import Path
from typing import Any

import pypdfium2 as pdfium
import pytest

from data_pipeline.domains import build_sample
from data_pipeline.inputs.documents.html_images import parse_srcset
from data_pipeline.inputs.documents.web import HtmlPages, MarkdownFiles
from data_pipeline.inputs.draft import Draft, Rejected
from tests.data_pipeline.chromium import print_to_pdf
from tests.data_pipeline.media_files import encoded, pattern

PHOTO = encoded(pattern(60, 80))
LARGE = encoded(pattern(120, 160), "PNG")

PAGE = """<!doctype html><html><head><title>All about  cats</title><style>p { color: red }</style></head><body>
<header><a href="/">Home</a></header><nav><a href="/a">Dogs</a> <a href="/b">Cats</a></nav>
<main><h1>Cats</h1><script>let no = "text"</script><p>A <b>cat</b> is a
  small&nbsp;animal.<br>It <a href="x">purrs</a>.<!-- a remark --></p>
<img src="photo.jpg" alt="A tabby"><p style="display: none">Hidden words</p><p hidden>Hidden too</p>
<h2>What cats do</h2><ul><li>sleep<ul><li>by day</li><li>by night</li></ul></li><li>eat <code>fish()</code></li></ul>
<ol start="3"><li>Wake.</li><li>Repeat.</li></ol>
<blockquote><p>Meow.</p><p>Purr.</p></blockquote>
<table><caption>Weights</caption><tr><th>cat</th><th>kg</th></tr><tr><td>Tom</td><td>5|6</td></tr></table>
<pre><code class="language-python">def cat():
    return "meow"
</code></pre><p>So much for &lt;image&gt; tags.</p><form>Subscribe! <input value="now"></form></main>
<aside>Buy food</aside><footer>2020 by nobody</footer></body></html>"""

TEXT = """# Cats

A cat is a small animal.
It purrs.

<image>

## What cats do

- sleep
  - by day
  - by night
- eat `fish()`

3. Wake.
4. Repeat.

> Meow.

> Purr.

Weights

| cat | kg |
| --- | --- |
| Tom | 5\\|6 |

```python
def cat():
    return "meow"
```

So much for < image > tags."""


def read(path: Path, content: str | bytes, **options: Any) -> Any:
    """Return the outcome of a document with this content, written beside photo.jpg."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (path.parent / "photo.jpg").write_bytes(PHOTO)
    kind = (MarkdownFiles if path.suffix == ".md" else HtmlPages)((str(path),), **options)
    (outcome,) = kind.read(kind.units()[0])
    return outcome


def text_of(path: Path, content: str, **options: Any) -> str:
    outcome = read(path, content, **options)
    assert isinstance(outcome, Draft), outcome
    return outcome.record["text"]


def test_a_page_becomes_the_text_that_its_reader_sees(tmp_path):
    draft = read(tmp_path / "cats.html", PAGE)
    assert draft == Draft(
        {"domain": "interleaved", "text": TEXT, "title": "All about cats"}, draft.images, (), "cats.html"
    )
    assert [(image.extension, image.data) for image in draft.images] == [("jpg", PHOTO)]
    build_sample(draft.record, images=1, videos=0)  # raises unless there is one placeholder per image


def test_words_are_those_that_chromium_shows(tmp_path):
    """Chromium decides what is visible. Navigation and forms are hidden for it."""
    hidden = "<style>header, nav, form, aside, footer { display: none }</style></head>"
    read_text = text_of(tmp_path / "cats.html", PAGE.replace("</head>", hidden)).replace("<image>", "")
    print_to_pdf(tmp_path / "cats.html", tmp_path / "cats.pdf")
    (page,) = pdfium.PdfDocument(tmp_path / "cats.pdf")
    shown = page.get_textpage().get_text_range()
    assert re.findall(r"\w+", read_text.replace("```python", "")) == re.findall(r"\w+", shown)


def test_markdown_gives_the_same_text_as_html(tmp_path):
    markdown = TEXT.replace("< image >", "&lt;image&gt;").replace("<image>", "![A tabby](photo.jpg)")
    markdown = markdown.replace("animal.\nIt", "animal.\\\nIt").replace("> Meow.\n\n> Purr.", "> Meow.\n>\n> Purr.")
    draft = read(tmp_path / "cats.md", f"---\ntitle: cats\n---\n{markdown}")
    assert draft.record["text"] == TEXT
    assert draft.images[0].data == PHOTO


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<p>a</p>b<div>c<span>d</span></div>", "a\n\nb\n\ncd"),
        ("<ul><li><p>one</p><p>more</p></li></ul>", "- one\n  more"),
        ("<ul><li>a <img src=photo.jpg> b</li><li>c</li></ul>", "- a\n\n<image>\n\n  b\n\n- c"),
        ("<ul><li>a</li></ul><ul><li>b</li></ul>", "- a\n\n- b"),
        ("<table><tr><td>only <img src=photo.jpg> a frame</td></tr></table>", "only\n\n<image>\n\na frame"),
        ("<table><tr><td></td><td>spaced</td></tr></table>", "spaced"),
        ("<table><tr><td>a<img src=photo.jpg></td><td>b</td></tr></table>", "| a | b |\n\n<image>"),
        (
            "<p>Energy <math><mi>E</mi><annotation encoding='application/x-tex'>E=mc^2</annotation></math>",
            "Energy $E=mc^2$",
        ),
        ("<body><ul>" + "<li><a href=x>menu</a></li>" * 6 + "</ul><p>words</p>", "words"),
        ("<article><h1>T</h1><p>the long story of it</p></article><p>other</p>", "# T\n\nthe long story of it"),
        ("<article>teaser</article><p>the page itself, and all of it", "teaser\n\nthe page itself, and all of it"),
        ("<header><h1>A name</h1></header><p>b</p>", "# A name\n\nb"),
        ("<div role=navigation>x</div><div aria-hidden=true>y</div><p>b</p>", "b"),
        ("<picture><source srcset='photo.jpg 2x'><img src=''></picture>", "<image>"),
        ("<img src='data:image/gif;base64,R0lGODlhAQABAAAAACw=' data-src=photo.jpg>", "<image>"),
    ],
)
def test_html_elements_become_markdown(tmp_path, html, text):
    assert text_of(tmp_path / "page.html", html) == text


def test_alternative_text_is_an_option(tmp_path):
    html = '<p>x<img src="photo.jpg" alt="A  tabby"></p>'
    assert text_of(tmp_path / "a.html", html, alt=True) == "x\n\nA tabby\n\n<image>"


def test_the_largest_image_of_a_srcset_replaces_a_missing_src(tmp_path):
    (tmp_path / "large.png").write_bytes(LARGE)
    uri = f"data:image/jpeg;base64,{base64.b64encode(PHOTO).decode()}"
    html = f'<img src="gone.jpg" srcset="{uri} 80w, large.png 160w"><img src="{uri}">'
    draft = read(tmp_path / "a.html", html)
    assert [(image.extension, image.data) for image in draft.images] == [("png", LARGE), ("jpg", PHOTO)]


@pytest.mark.parametrize(
    ("srcset", "candidates"),
    [
        ("a.jpg", [("a.jpg", 1)]),
        ("a.jpg 1x, b.jpg 2.5x", [("a.jpg", 1), ("b.jpg", 2.5)]),
        (" a.jpg 80w,\n b.jpg  160w ", [("a.jpg", 80), ("b.jpg", 160)]),
        ("data:image/png;base64,AA== 1x, b.jpg 2x", [("data:image/png;base64,AA==", 1), ("b.jpg", 2)]),
        ("a.jpg, b.jpg 2x", [("a.jpg", 1), ("b.jpg", 2)]),
        ("", []),
    ],
)
def test_srcset_is_parsed_by_the_rule_of_html(srcset, candidates):
    assert parse_srcset(srcset) == candidates


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("https://example.org/cat.jpg", "remote_file"),
        ("//example.org/cat.jpg", "remote_file"),
        ("../secret.jpg", "outside_folder"),
        ("%2e%2e/secret.jpg", "outside_folder"),
        ("link.jpg", "outside_folder"),
        ("file:///etc/passwd", "missing_file"),
        ("gone.jpg", "missing_file"),
        ("a%00b.jpg", "missing_file"),
        ("words.jpg", "unreadable_image"),
        ("data:image/png;base64,####", "bad_data_uri"),
        ("data:image/png", "bad_data_uri"),
        ("tiny.png", "small_image"),
    ],
)
def test_unusable_images_are_dropped_and_counted(tmp_path, reference, reason):
    folder = tmp_path / "site"
    folder.mkdir()
    (tmp_path / "secret.jpg").write_bytes(PHOTO)
    os.symlink(tmp_path / "secret.jpg", folder / "link.jpg")
    (folder / "words.jpg").write_text("not an image")
    (folder / "tiny.png").write_bytes(encoded(pattern(16, 300), "PNG"))
    html = f'<p>Words</p><img src="{reference}">'
    draft = read(folder / "a.html", html)
    assert isinstance(draft, Draft)
    assert (draft.record["text"], draft.images) == ("Words", [])
    assert draft.record["dropped_images"] == {reason: 1}
    strict = read(folder / "a.html", html, bad_images="reject")
    assert isinstance(strict, Draft) if reason == "small_image" else strict.reason == reason
    if reason == "outside_folder":
        assert len(read(folder / "a.html", html, allow_outside=True).images) == 1


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.html", b"", "empty_document"),
        ("a.html", b"<body><nav>only a menu</nav>", "empty_document"),
        ("a.md", b"\xff\xfe\x00", "not_utf8"),
        ("a.md", b"\n\n", "empty_document"),
    ],
)
def test_unusable_documents_are_rejected(tmp_path, name, content, reason):
    outcome = read(tmp_path / name, content)
    assert isinstance(outcome, Rejected)
    assert (outcome.origin, outcome.reason) == (name, reason)


def test_deeply_nested_and_damaged_pages_do_not_raise(tmp_path):
    for html in (
        "<div>" * 20_000 + "deep",
        "<ul><li>" * 5_000 + "deep",
        "<table><tr><td>" * 3_000 + "deep",
        "<p",
        "<!--",
    ):
        outcome = read(tmp_path / "a.html", html)
        assert isinstance(outcome, Draft) or outcome.reason in ("unreadable_document", "empty_document")


@pytest.mark.parametrize(
    ("declared", "written", "text"),
    [
        ("shift_jis", "shift_jis", "図の中に猫がいる。"),
        ("gb2312", "gbk", "中文镕"),  # the second character is not in GB 2312
        ("iso-8859-1", "cp1252", "“so” – 5 €"),  # nor are these in Latin 1
        ("utf-16", "utf-8", "é"),
        ("no-such-thing", "utf-8", "é"),
        ("windows-1252", "utf-8-sig", "é"),  # the byte order mark overrides the declaration
        ("", "utf-16", "日本語"),
        ("", "utf-8", "日本語"),
        ("utf-8", "latin-1", None),
        ("", "shift_jis", None),
        ("", "utf-16-le", None),
        ("hex", "latin-1", None),
    ],
)
def test_pages_are_decoded_by_their_declared_encoding(tmp_path, declared, written, text):
    meta = f'<meta charset="{declared}">' if declared else ""
    outcome = read(tmp_path / "a.html", f"{meta}<p>{text or 'é日'}</p>".encode(written, "replace"))
    assert outcome.record["text"] == text if text else outcome.reason == "not_utf8"


@pytest.mark.parametrize("name", ["src", "data-lazy-src", "data-srcset"])
def test_lazily_loaded_images_are_found(tmp_path, name):
    assert text_of(tmp_path / "a.html", f"<p>a<img {name}=photo.jpg>") == "a\n\n<image>"


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("10<sup>6</sup>, 10<sup>-3</sup>, 10<sup>23</sup>, x<sup>2</sup>", "10^6, 10^-3, 10^23, x^2"),
        ("H<sub>2</sub>O, a<sub>i</sub>, x<sup>n + 1</sup>, x<sub></sub>", "H_2O, a_i, x^{n + 1}, x"),
        ("the 1<sup>st</sup> and n<sup>th</sup> Foo<sup>TM</sup>, x<sup>a</sup>", "the 1st and nth FooTM, x^a"),
        ("so<sup><a href='#n1'>1</a></sup>, so<sup>[2]</sup>", "so[1], so[2]"),
        ("<ruby>漢<rp>(</rp><rt>kan</rt><rp>)</rp>字<rt>ji</rt></ruby>", "漢字"),
        ("soft&shy;hyphen zero&#8203;width می\u200cروم", "softhyphen zerowidth می\u200cروم"),
        ("<p><sup>Syntax</sup><br>a <sub>as said above</sub></p>", "Syntax\na as said above"),
        ("<p><sup>14</sup>C</p>", "^14C"),
        ("he said <q>no</q>", "he said “no”"),
        ("<ol start=3><li>a<li value=7>b<li>c</ol>", "3. a\n7. b\n8. c"),
        ("<pre>a<br>b<button>Copy</button>\n  c</pre>", "```\na\nb\n  c\n```"),
        ("<pre><code><div>a</div><div>b</div></code></pre>", "```\na\nb\n```"),
        ("<dl><dt>term</dt><dd>what it is</dd></dl>", "term\n\nwhat it is"),
        ("<details><summary>More</summary>inside</details>", "More\n\ninside"),
    ],
)
def test_inline_marks_keep_values_apart(tmp_path, html, text):
    assert text_of(tmp_path / "a.html", f"<p>{html}</p>" if html[0] != "<" else html) == text


def test_cells_that_cover_others_keep_their_columns(tmp_path):
    head = "<tr><th rowspan=2>name</th><th colspan=2>size</th></tr><tr><th>w</th><th>h</th></tr>"
    body = (
        "<tr><td>a</td><td>1</td><td>2</td></tr><tr><td colspan=3>all</td></tr><tr><td>b</td><td rowspan=0>3</td></tr>"
    )
    assert text_of(tmp_path / "a.html", f"<p>x</p><table>{head}{body}</table>").split("\n")[2:] == [
        "| name | size |  |",
        "| --- | --- | --- |",
        "|  | w | h |",
        "| a | 1 | 2 |",
        "| all |  |  |",
        "| b | 3 |  |",
    ]


KATEX = """<span class="katex"><span class="katex-mathml"><math><semantics><mi>x</mi><annotation
encoding="application/x-tex">x^2</annotation></semantics></math></span><span class="katex-html"
aria-hidden="true">x2</span></span>"""
MATHJAX = """<span class="MathJax_Preview">x2</span><span class="MathJax"><span>x2</span></span>
<script type="math/tex">x^2</script>"""
WIKIPEDIA = """<span class="mwe-math-element"><span class="mwe-math-mathml-inline" style="display: none;"><math
alttext="{\\displaystyle x^2}"><mi>x</mi></math></span><img src="https://x.org/a.svg" alt="{\\displaystyle x^2}"
class="mwe-math-fallback-image-inline" aria-hidden="true"></span>"""
WORDPRESS = '<img src="https://x.org/latex.php?x" class="latex" alt="x^2">'


@pytest.mark.parametrize("formula", [KATEX, MATHJAX, WIKIPEDIA, WORDPRESS, '<math alttext="x^2"><mi>x</mi></math>'])
def test_formulas_are_read_once_as_tex(tmp_path, formula):
    draft = read(tmp_path / "a.html", f"<p>So {formula} is.</p>")
    assert (draft.record["text"], draft.images) == ("So $x^2$ is.", [])


@pytest.mark.parametrize(
    ("html", "images"),
    [
        ('<img class="lazy" width="687"><noscript><img src="photo.jpg"></noscript>', 1),
        ('<img data-src="photo.jpg"><noscript><img src="photo.jpg"></noscript>', 1),
        ('<img src="photo.jpg"><p>x<noscript><img src="large.png"></noscript>', 2),
        ('<img class="lazyload" src="large.png" data-src="photo.jpg">', 1),
        ("<img data-actualsrc=photo.jpg>", 1),
        ('<picture><source srcset="g.xyz"><source data-srcset="photo.jpg 2x"><img src="gone.jpg"></picture>', 1),
    ],
)
def test_images_of_lazy_pages_are_found_once(tmp_path, html, images):
    (tmp_path / "large.png").write_bytes(LARGE)
    draft = read(tmp_path / "a.html", f"<p>Words</p>{html}")
    assert (len(draft.images), draft.images[0].data) == (images, PHOTO)


def test_elements_that_are_not_read_are_named(tmp_path):
    media = "<iframe src=x></iframe><svg><text>t</text></svg><canvas></canvas><video>v</video><audio></audio>"
    html = f"<article><p>The words of this page</p>{media}<object data=a.swf></object><embed src=a.swf>"
    html += "<div style='display: none'>x</div><form>y</form><nav>z</nav><img src=gone.jpg></article><p>Other"
    draft = read(tmp_path / "a.html", html)
    assert draft.record["text"] == "The words of this page"
    once = ("iframe", "svg", "canvas", "video", "audio", "object", "embed", "form", "nav")
    assert draft.not_read == {
        **dict.fromkeys((f"element {name}" for name in once), 1),
        "hidden element": 1,
        "image: missing_file": 1,
        "text outside the main content": 1,
    }


def test_markdown_keeps_formulas_and_footnotes_and_names_its_header(tmp_path):
    text = "$x_1 * y_2 * z$ costs $5 and $6.\n\nNote[^1] and H<sub>2</sub>O.\n\n[^1]: http://example.com"
    draft = read(tmp_path / "a.md", f"---\na: 1\n---\n{text}\n")
    assert draft.record["text"] == text.replace("H<sub>2</sub>O", "H_2O")
    assert draft.not_read == {"front matter": 1}


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<ul><li>a</li><ul><li>b</li></ul><li>c</li></ul>", "- a\n  - b\n- c"),
        ("<ol start=3><li>a</li> more <li value=9>b</li></ol>", "3. a\n   more\n9. b"),
        ("<table><tr><td>a<td colspan=0000000000000002>b</tr></table>", "| a | b |"),
    ],
)
def test_what_stands_between_list_items_is_read(tmp_path, html, text):
    assert text_of(tmp_path / "a.html", f"<body>{html}") == text


def test_hidden_rows_and_cells_are_counted(tmp_path):
    draft = read(tmp_path / "a.html", "<table><tr><td>a<td>b<tr hidden><td>c<tr><td>d<td hidden>e<td>f</table>")
    assert draft.record["text"] == "| a | b |\n| d | f |"
    assert draft.not_read == {"hidden element": 2}


def test_a_horizontal_rule_begins_no_front_matter(tmp_path):
    draft = read(tmp_path / "a.md", "---\n\nAn introduction.\n\n---\n\nText.\n")
    assert draft.record["text"] == "An introduction.\n\nText."
    assert not draft.not_read
