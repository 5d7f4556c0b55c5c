"""Screenshots by a real Chromium: boxes against the pixels of uniquely coloured elements, and hostile pages."""

from __future__ import annotations

import io
import socketserver
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.domains import build_sample
from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.draft import Draft, Rejected
from data_pipeline.inputs.grounding.browser import Chromium
from data_pipeline.inputs.grounding.gui import VIEWPORTS, Gui
from data_pipeline.inputs.grounding.screen import Screen, Viewport
from data_pipeline.media.boxes import to_pixels, written_boxes
from data_pipeline.sample import Text

SMALL = Viewport(400, 300)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    browser = Chromium(time_limit=20)
    yield browser
    browser.close()


def page(folder: Path, body: str, name: str = "page.html", head: str = "") -> Path:
    path = folder / name
    path.write_text(f"<!doctype html><html><head>{head}</head><body style='margin:0'>{body}</body></html>")
    return path


def block(name: str, colour: str, left: float, top: float, width: float, height: float, more: str = "") -> str:
    position = f"position:absolute;left:{left}px;top:{top}px;width:{width}px;height:{height}px"
    return f"<button aria-label='{name}' style='{position};background:{colour};border:0;padding:0;{more}'></button>"


def extent(screen: Screen, colour: tuple[int, int, int]) -> tuple[float, float, float, float]:
    """Return the box around the pixels of exactly this colour."""
    pixels = np.asarray(Image.open(io.BytesIO(screen.png)).convert("RGB"))
    rows, columns = np.nonzero((pixels == colour).all(axis=-1))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def boxes(screen: Screen) -> dict[str, tuple[float, float, float, float]]:
    return {element.name: element.box for element in screen.elements}


def test_boxes_match_the_visible_pixels_of_elements(chromium: Chromium, tmp_path: Path) -> None:
    coloured = {
        "plain": ("#ff0001", (255, 0, 1), block("plain", "#ff0001", 20, 30, 60, 40)),
        "fractions": ("#ff0002", (255, 0, 2), block("fractions", "#ff0002", 100.4, 30.6, 50.5, 20.3)),
        "turned": ("#ff0003", (255, 0, 3), block("turned", "#ff0003", 200, 40, 60, 20, "transform:rotate(90deg)")),
        "leaving": ("#ff0004", (255, 0, 4), block("leaving", "#ff0004", 360, 200, 80, 30)),
        "round": ("#ff0005", (255, 0, 5), block("round", "#ff0005", 20, 100, 60, 60, "border-radius:25%")),
    }
    # Inside a box of 100 x 50 that clips its overflow.
    clipped = "<div style='position:absolute;left:150px;top:100px;width:100px;height:50px;overflow:hidden'>"
    clipped += block("clipped", "#ff0006", 40, 20, 200, 200) + "</div>"
    coloured["clipped"] = ("#ff0006", (255, 0, 6), clipped)
    screen = chromium.screenshot(page(tmp_path, "".join(item[2] for item in coloured.values())), tmp_path, SMALL)
    assert boxes(screen).keys() == coloured.keys()
    for name, (_, colour, _) in coloured.items():
        assert np.abs(np.subtract(boxes(screen)[name], extent(screen, colour))).max() <= 1, name


@pytest.mark.parametrize(("tag", "role"), [("p", "text"), ("h2", "heading")])
def test_box_of_text_fits_its_glyph_pixels(tag: str, role: str, chromium: Chromium, tmp_path: Path) -> None:
    style = "margin:80px 50px;color:#f0f;font:20px DejaVu Sans"
    body = f"<{tag} style='{style}'>Hello world</{tag}>"
    screen = chromium.screenshot(page(tmp_path, body), tmp_path, SMALL)
    (element,) = screen.elements
    assert (element.role, element.name) == (role, "Hello world")
    pixels = np.asarray(Image.open(io.BytesIO(screen.png)).convert("RGB"))
    rows, columns = np.nonzero((pixels != 255).any(axis=-1))
    x1, y1, x2, y2 = element.box
    assert x1 <= columns.min() < x1 + 4  # side bearings and line height are part of the box
    assert x2 - 4 < columns.max() + 1 <= x2 + 1
    assert y1 <= rows.min() < rows.max() < y2
    assert y2 - y1 < 30


def test_invisible_elements_have_no_box(chromium: Chromium, tmp_path: Path) -> None:
    hidden = [
        block("below the fold", "red", 10, 500, 50, 20),
        block("without opacity", "red", 10, 10, 50, 20, "opacity:0"),
        block("invisible", "red", 10, 40, 50, 20, "visibility:hidden"),
        block("not displayed", "red", 10, 70, 50, 20, "display:none"),
        block("covered", "red", 10, 100, 50, 20),
        block("half covered", "red", 10, 130, 100, 20),
        "<div style='position:absolute;left:0;top:95px;width:70px;height:100px;background:blue;pointer-events:none'>"
        "</div>",
    ]
    seen = block("seen", "lime", 200, 10, 50, 20)
    screen = chromium.screenshot(page(tmp_path, "".join(hidden) + seen), tmp_path, SMALL)
    assert boxes(screen) == {"seen": (200, 10, 250, 30)}


def test_roles_and_names_come_from_the_accessibility_tree(chromium: Chromium, tmp_path: Path) -> None:
    body = """<h1>Title</h1><p>Some <b>bold</b> text</p><a href='x.html'>Read <i>more</i></a><br>
        <label>Name <input value='secret'></label><input type=checkbox aria-label=Agree>
        <input type=radio title=One><select aria-label=Size><option>S</select><button>Save</button>
        <div role=button aria-label=Close style='width:20px;height:20px'></div><input type=password placeholder=PIN>"""
    screen = chromium.screenshot(page(tmp_path, body), tmp_path, VIEWPORTS["desktop"])
    found = [(element.role, element.name) for element in screen.elements]
    assert found == [
        ("heading", "Title"),
        ("text", "Some"),
        ("text", "bold"),
        ("text", "text"),
        ("link", "Read more"),
        ("text", "Name"),
        ("text field", "Name"),
        ("checkbox", "Agree"),
        ("radio button", "One"),
        ("drop-down list", "Size"),
        ("button", "Save"),
        ("button", "Close"),
        ("text field", "PIN"),
    ]


def test_same_page_gives_the_same_bytes(chromium: Chromium, tmp_path: Path) -> None:
    restless = """<style>@keyframes spin { to { transform: rotate(1turn) } } #s { animation: spin 1s infinite }
        #t { transition: all 3s } </style><p id=s>spin</p><p id=t>t</p><p id=r></p><p id=d></p><input autofocus>
        <script>r.textContent = Math.random(); d.textContent = new Date();
        t.style.marginLeft = '100px'; setInterval(() => { d.textContent = Date.now() }, 7);
        t.animate([{opacity: 0}, {opacity: 1}], 5000);</script>"""
    path = page(tmp_path, restless)
    screens = [chromium.screenshot(path, tmp_path, SMALL)]
    time.sleep(0.3)
    screens.append(chromium.screenshot(path, tmp_path, SMALL))
    other = Chromium()
    screens.append(other.screenshot(path, tmp_path, SMALL))
    other.close()
    assert screens[0] == screens[1] == screens[2]
    assert len(screens[0].elements) >= 4


def test_scripts_run_only_with_java_script(chromium: Chromium, tmp_path: Path) -> None:
    body = "<p id=p>before</p><script>setTimeout(() => { p.textContent = 'after' }, 500)</script>"
    path = page(tmp_path, body)
    assert [e.name for e in chromium.screenshot(path, tmp_path, SMALL).elements] == ["after"]
    without = Chromium(java_script=False)
    assert [e.name for e in without.screenshot(path, tmp_path, SMALL).elements] == ["before"]
    without.close()


def test_scripts_of_a_page_cannot_change_its_boxes(chromium: Chromium, tmp_path: Path) -> None:
    lie = """<script>Element.prototype.getBoundingClientRect = () => new DOMRect(0, 0, 9, 9);
        Document.prototype.elementFromPoint = () => null; Array.prototype.map = () => ['x'];</script>"""
    screen = chromium.screenshot(page(tmp_path, lie + block("true", "red", 50, 60, 70, 80)), tmp_path, SMALL)
    assert boxes(screen) == {"true": (50, 60, 120, 140)}


HOSTILE = {
    "loop": ("page_timeout", "<p>x</p><script>while (true) {}</script>"),
    "late_loop": ("page_timeout", "<p>x</p><script>onload = () => setTimeout(() => { while (true) {} }, 100)</script>"),
    "promises": ("page_timeout", "<script>onload = function f() { Promise.resolve().then(f) }</script>"),
    "alert": ("hostile_page", "<script>while (true) alert(1)</script>"),
    "prompt": ("hostile_page", "<script>onload = () => { prompt('?'); }</script>"),
    "popup": ("hostile_page", "<script>window.open('page.html'); window.open('about:blank')</script>"),
    "redirect": ("hostile_page", "<script>location = 'http://127.0.0.1:PORT/x'</script>"),
    "late_redirect": ("hostile_page", "<script>onload = () => setTimeout(() => location = 'page.html', 50)</script>"),
    "refresh": ("hostile_page", "<meta http-equiv=refresh content='0;url=page.html'><p>x</p>"),
    "download": ("hostile_page", "<a id=a download=evil.sh href='data:text/plain,x'>x</a><script>a.click()</script>"),
    "blob": (
        "hostile_page",
        "<a id=a download=evil.sh>x</a><script>a.href = URL.createObjectURL(new Blob(['x'])); a.click()</script>",
    ),
}


def test_hostile_pages_are_rejected_and_leave_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, pages = tmp_path / "home", tmp_path / "pages"
    home.mkdir()
    pages.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    with listening() as (port, connections):
        for name, (_, body) in HOSTILE.items():
            page(pages, body.replace("PORT", str(port)), f"{name}.html")
        page(pages, "<p>harmless</p>", "page.html")
        before = sorted(tmp_path.rglob("*"))
        browser = Chromium()
        for name, (reason, _) in HOSTILE.items():
            browser.time_limit = 1.0 if reason == "page_timeout" else 20.0
            began = time.monotonic()
            with pytest.raises(BadSample) as caught:
                browser.screenshot(pages / f"{name}.html", pages, SMALL)
            assert (name, caught.value.reason) == (name, reason)
            assert time.monotonic() - began < 10, name
        assert [e.name for e in browser.screenshot(pages / "page.html", pages, SMALL).elements] == ["harmless"]
        browser.close()
    assert not connections
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_is_loaded_from_outside_the_folder(chromium: Chromium, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for folder, colour in ((tmp_path, (255, 0, 0)), (root, (0, 255, 0))):
        Image.new("RGB", (40, 40), colour).save(folder / "square.png")
    (root / "link.png").symlink_to(tmp_path / "square.png")
    with listening() as (port, connections):
        web = f"127.0.0.1:{port}"
        body = f"""<img src=square.png><img src=../square.png><img src=link.png><img src='{tmp_path}/square.png'>
            <img src='http://{web}/a.png'><iframe src='file:///etc/passwd'></iframe>
            <link rel=prefetch href='http://{web}/b'><link rel=preconnect href='http://{web}'>
            <script>fetch('http://{web}/c').catch(e => 0); navigator.sendBeacon('http://{web}/d', 'x');
            new WebSocket('ws://{web}/e'); new EventSource('http://{web}/f');
            new RTCPeerConnection({{iceServers: [{{urls: 'turn:{web}?transport=tcp', username: 'u', credential: 'c'}}]
            }}).createDataChannel('x');</script>"""
        screen = chromium.screenshot(page(root, body), root, SMALL)
        time.sleep(0.3)
    pixels = np.asarray(Image.open(io.BytesIO(screen.png)).convert("RGB"))
    assert (pixels == (0, 255, 0)).all(axis=-1).sum() == 40 * 40
    assert not (pixels == (255, 0, 0)).all(axis=-1).any()
    assert not connections


def listening():
    """Return a server that records all connections."""
    connections: list[str] = []

    class Recorder(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            connections.append(str(self.request.recv(100)))

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

        def __enter__(self) -> Any:
            threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
            return self.server_address[1], connections

        def __exit__(self, *_) -> None:
            self.shutdown()
            self.server_close()

    return Server(("127.0.0.1", 0), Recorder)


def test_page_becomes_chat_and_list_with_boxes(tmp_path: Path) -> None:
    page(
        tmp_path,
        block("Save", "#ff0001", 20, 30, 60, 40) + block("Open &lt;image&gt;", "red", 200, 30, 60, 40),
        "a.html",
    )
    (tmp_path / "sub").mkdir()
    page(tmp_path / "sub", "", "empty.html")
    given = Gui((str(tmp_path),), viewports=("desktop", "phone"), time_limit=20)
    assert [Path(unit.path).name for unit in given.units()] == ["a.html", "empty.html"]
    made = [sample for unit in given.units() for sample in given.read(unit)]
    assert list(given.read(given.units()[0])) == made[:4]  # the same again
    drafts = [sample for sample in made if isinstance(sample, Draft)]
    rejected = [sample for sample in made if isinstance(sample, Rejected)]
    assert [(sample.origin, sample.reason) for sample in rejected] == [
        ("sub/empty.html@desktop", "no_boxes"),
        ("sub/empty.html@phone", "no_boxes"),
    ]
    assert [draft.record["domain"] for draft in drafts] == ["chat", "grounding"] * 2
    for draft, viewport in zip(drafts, [VIEWPORTS["desktop"]] * 2 + [VIEWPORTS["phone"]] * 2, strict=True):
        sample = build_sample(draft.record, images=1, videos=0)  # as in training
        text = "".join(element.text for element in sample.elements if isinstance(element, Text))
        assert 'button "Save"' in text
        assert "Open" not in text  # its name contains a placeholder
        ((_, box),) = written_boxes(text)
        image = Image.open(io.BytesIO(draft.images[0].data))
        assert image.size == (viewport.width, viewport.height)
        seen = extent(Screen(draft.images[0].data, ()), (255, 0, 1))
        half_a_step = np.array([image.width, image.height] * 2) / 2000
        assert (np.abs(np.subtract(to_pixels(box, *image.size), seen)) <= 1 + half_a_step).all()


def test_list_of_local_pages_is_read(tmp_path: Path) -> None:
    path = page(tmp_path, "<p>x</p>", "my page.html")
    (tmp_path / "list.txt").write_text(f"my page.html\n{path.as_uri()}\nmissing.html\n", "utf-8-sig")
    given = Gui((str(tmp_path / "list.txt"),), form="list", viewports=("desktop",))
    made = [sample for unit in given.units() for sample in given.read(unit)]
    assert [type(sample) for sample in made] == [Draft, Draft, Rejected]
    (tmp_path / "list.txt").write_text("http://example.org/\n")
    with pytest.raises(DataError, match="not a local page"):
        given.units()


def test_wrong_options_are_refused() -> None:
    with pytest.raises(DataError, match="use desktop"):
        Gui(("x",), viewports=("dekstop",))
    with pytest.raises(DataError, match="name one or more of desktop"):
        Gui(("x",), viewports=())
    with pytest.raises(DataError, match=r"viewports=phone,phone: name one or more of .*, each once"):
        Gui(("x",), viewports=("phone", "phone"))
    with pytest.raises(DataError, match="give positive numbers"):
        Gui(("x",), time_limit=float("nan"))


def test_missing_browser_is_reported(tmp_path: Path) -> None:
    path = page(tmp_path, "<p>x</p>")
    missing = Chromium("no-such-browser")
    with pytest.raises(DataError, match="not installed"):
        missing.screenshot(path, tmp_path, SMALL)
    missing.close()
