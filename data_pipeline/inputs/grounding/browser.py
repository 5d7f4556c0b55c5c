"""A headless Chromium that photographs local pages and says where their elements are.

Pages are not trusted. Nothing is loaded but files under the folder given, nothing is downloaded, no dialog or second
window stays open, and every page has a time limit; the profile is a new one, thrown away with the browser. What
Chromium is asked about the page is asked from a world of its own, where the page's scripts cannot answer in its stead.

The same page gives the same picture: one device pixel a CSS pixel, a clock that stands still but for the two seconds
given to the page's timers, random numbers from a fixed seed, animations at their end, no caret.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from data_pipeline.errors import BadSample, DataError
from data_pipeline.media.boxes import Box

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--blink-settings=imageAnimationPolicy=2",  # animated pictures show their first frame
)
THE_TIME = 1_704_110_400  # 1 January 2024, noon UTC
TIMERS_MS = 2000  # how far a page's clock is moved before the picture is taken
MAX_ELEMENTS = 2000
_CLOSING = 10  # seconds

# Roles of Chromium's accessibility tree, as samples name them.
INTERACTIVE = {
    **{role: role for role in ("button", "link", "checkbox", "tab", "switch", "slider", "searchbox", "option")},
    **{"textbox": "text field", "combobox": "drop-down list", "radio": "radio button", "menuitem": "menu item"},
    **{"spinbutton": "number field", "PopUpButton": "drop-down list", "ComboBoxSelect": "drop-down list"},
    **{"ComboBoxMenuButton": "drop-down list", "DisclosureTriangle": "disclosure triangle"},
}
READABLE = {"heading": "heading", "image": "image", "img": "image", "StaticText": "text"}
ROLES = {**INTERACTIVE, **READABLE}


@dataclass(frozen=True)
class Viewport:
    width: int
    height: int
    mobile: bool = False


@dataclass(frozen=True)
class Element:
    """role: a word of ROLES; name: its accessible name; box: the part of it that is seen, in pixels of the picture."""

    role: str
    name: str
    box: Box


@dataclass(frozen=True)
class Screen:
    """What a viewport shows. png: the picture; elements: in the order of the page."""

    png: bytes
    elements: tuple[Element, ...]


class Chromium:
    """A browser, started when it is first needed and anew when a page has hurt it.

    executable: empty for the first of CHROMIUM_NAMES on the PATH; time_limit: seconds a page.
    """

    def __init__(self, executable: str = "", *, java_script: bool = True, time_limit: float = 20.0):
        self.executable, self.java_script, self.time_limit = executable, java_script, time_limit
        self._runner = asyncio.Runner()
        self._home = ""  # where the browser may write
        self._driver: Any = None
        self._browser: Any = None

    def photograph(self, page: Path, root: Path, viewport: Viewport) -> Screen:
        """The page as this viewport shows it, loading nothing from outside the folder `root`.

        Raises DataError if the browser cannot be started, and BadSample: `page_timeout`, `hostile_page` (it opened a
        dialog or a window, went elsewhere, or started a download), `page_failed`.
        """
        return self._runner.run(self._photograph(page, root, viewport))

    def close(self) -> None:
        self._runner.run(self._stop())
        self._runner.close()

    async def _photograph(self, page: Path, root: Path, viewport: Viewport) -> Screen:
        browser = await self._started()
        context = await _new_context(browser, root, viewport, self.java_script)
        try:
            async with asyncio.timeout(self.time_limit):
                return await _photograph(context, page, viewport, self.java_script)
        except TimeoutError as error:
            raise BadSample("page_timeout", f"{page.name} took more than {self.time_limit:g} seconds") from error
        finally:
            await self._close(context)

    async def _started(self) -> Any:
        if self._browser is not None and self._browser.is_connected():
            return self._browser
        await self._stop()
        try:
            from playwright.async_api import Error, async_playwright
        except ImportError as error:
            raise DataError("pictures of web pages need playwright: pip install -e '.[gui]'") from error
        program = find_chromium(self.executable)
        self._home = tempfile.mkdtemp(prefix="chromium-")
        self._driver = await async_playwright().start()
        try:
            self._browser = await self._driver.chromium.launch(
                executable_path=program,
                args=list(ARGUMENTS),
                env={"PATH": os.environ.get("PATH", ""), "HOME": self._home, "TMPDIR": self._home},
            )
        except Error as error:
            await self._stop()
            raise DataError(f"{program} does not start: {error.message.splitlines()[0]}") from error
        return self._browser

    async def _close(self, context: Any) -> None:
        """Closes a page's context, which ends its process too; ends the browser if that cannot be done."""
        from playwright.async_api import Error

        try:
            async with asyncio.timeout(_CLOSING):
                await context.close()
        except (TimeoutError, Error):
            await self._stop()

    async def _stop(self) -> None:
        """Ends the browser, whatever state its pages are in: the driver kills one that does not answer."""
        browser, self._browser = self._browser, None
        driver, self._driver = self._driver, None
        home, self._home = self._home, ""
        if browser is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(_CLOSING):
                    await browser.close()
        if driver is not None:
            await driver.stop()
        if home:
            shutil.rmtree(home, ignore_errors=True)


def find_chromium(executable: str = "") -> str:
    """The browser's path. Raises DataError naming the mend."""
    found = next(filter(None, map(shutil.which, (executable,) if executable else CHROMIUM_NAMES)), None)
    if found is None:
        raise DataError(
            f"{executable or 'Chromium'} is not installed: install a Chromium (Debian's package is called chromium), "
            "or name its program with --set chromium=PATH"
        )
    return found


async def _new_context(browser: Any, root: Path, viewport: Viewport, java_script: bool) -> Any:
    context = await browser.new_context(
        viewport={"width": viewport.width, "height": viewport.height},
        device_scale_factor=1,
        is_mobile=viewport.mobile,
        has_touch=viewport.mobile,
        java_script_enabled=java_script,
        accept_downloads=False,
        offline=True,
        service_workers="block",
        reduced_motion="reduce",
        color_scheme="light",
        locale="en-US",
        timezone_id="UTC",
    )
    await context.route("**/*", _only_under(root.resolve()))
    if java_script:
        await context.clock.install(time=THE_TIME)
        await context.clock.pause_at(THE_TIME + 1)
        await context.add_init_script(_SEEDED_RANDOM)
    return context


async def _photograph(context: Any, page: Path, viewport: Viewport, java_script: bool) -> Screen:
    from playwright.async_api import Error

    tab = await context.new_page()
    offence = _offence(context, tab)
    work = asyncio.ensure_future(_capture(context, tab, page, viewport, java_script))
    try:
        either: tuple[asyncio.Future[Any], ...] = (work, offence)
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if offence.done():
            raise BadSample("hostile_page", f"{page.name} {offence.result()}")
        return work.result()
    except Error as error:
        raise BadSample("page_failed", f"{page.name}: {error.message.splitlines()[0]}") from error
    finally:
        work.cancel()
        offence.cancel()


async def _capture(context: Any, tab: Any, page: Path, viewport: Viewport, java_script: bool) -> Screen:
    await tab.goto(page.resolve().as_uri(), wait_until="load", timeout=0)
    if java_script:
        await tab.clock.run_for(TIMERS_MS)
    session = await context.new_cdp_session(tab)
    await _settle(session)
    png = await tab.screenshot(type="png", animations="allow", caret="hide", timeout=0)
    return Screen(png, await _elements(session, viewport))


def _only_under(root: Path) -> Any:
    """A handler of requests that lets files under this folder through, links resolved, and nothing else."""

    async def handle(route: Any) -> None:
        url = urlsplit(route.request.url)
        allowed = url.scheme in ("data", "blob")
        if url.scheme == "file" and not url.netloc:
            try:
                allowed = Path(unquote(url.path)).resolve().is_relative_to(root)
            except (OSError, ValueError):
                allowed = False
        with suppress(Exception):  # the page has closed meanwhile
            await (route.continue_() if allowed else route.abort())

    return handle


def _offence(context: Any, tab: Any) -> asyncio.Future[str]:
    """Comes true when the page does what no harmless page does: says what."""
    offence: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    navigations: list[str] = []

    def note(what: str) -> None:
        if not offence.done():
            offence.set_result(what)

    def asked(request: Any) -> None:
        if request.is_navigation_request() and request.frame == tab.main_frame:
            navigations.append(request.url)
            if len(navigations) > 1:
                note(f"went to {request.url[:100]}")

    tab.on("dialog", lambda dialog: note(f"opened a dialog ({dialog.type})"))
    tab.on("download", lambda _: note("started a download"))
    tab.on("request", asked)
    context.on("page", lambda _: note("opened a window"))
    return offence


# --- elements ---------------------------------------------------------------------------------------------------------


async def _elements(session: Any, viewport: Viewport) -> tuple[Element, ...]:
    """The named elements of the accessibility tree that are seen whole or in part."""
    nodes = (await session.send("Accessibility.getFullAXTree"))["nodes"]
    named = list(_named(nodes))[:MAX_ELEMENTS]
    world = await _own_world(session)
    handles = await asyncio.gather(*(_handle(session, world, backend_id) for _, _, backend_id in named))
    present = [(role, name, handle) for (role, name, _), handle in zip(named, handles, strict=True) if handle]
    if not present:
        return ()
    answer = await session.send(
        "Runtime.callFunctionOn",
        {
            "functionDeclaration": _SEEN_PARTS,
            "executionContextId": world,
            "arguments": [
                {"value": [viewport.width, viewport.height]},
                {"value": [role == "heading" for role, _, _ in present]},
                *({"objectId": handle} for _, _, handle in present),
            ],
            "returnByValue": True,
        },
    )
    boxes = answer["result"]["value"]
    return tuple(
        Element(role, name, (box[0], box[1], box[2], box[3]))
        for (role, name, _), box in zip(present, boxes, strict=True)
        if box
    )


def _named(nodes: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str, int]]:
    """(role, name, DOM node) of every element that has a name. What lies in a named element is part of it."""
    by_id = {node["nodeId"]: node for node in nodes}
    stack: list[tuple[str, bool]] = [(nodes[0]["nodeId"], False)] if nodes else []
    while stack:
        node_id, inside = stack.pop()
        node = by_id.get(node_id)
        if node is None:
            continue
        role = ROLES.get(node.get("role", {}).get("value"), "")
        name = " ".join(str(node.get("name", {}).get("value") or "").split())
        taken = bool(role and name and not node.get("ignored") and not inside and "backendDOMNodeId" in node)
        if taken:
            yield role, name, node["backendDOMNodeId"]
        stack += [(child, inside or taken) for child in reversed(node.get("childIds", []))]


async def _handle(session: Any, world: int, backend_id: int) -> str | None:
    from playwright.async_api import Error

    try:
        resolved = await session.send("DOM.resolveNode", {"backendNodeId": backend_id, "executionContextId": world})
    except Error:  # the node is gone
        return None
    return resolved["object"].get("objectId")


async def _own_world(session: Any) -> int:
    """A world in the page's main frame that sees its document but none of its scripts' changes to the language."""
    frame = (await session.send("Page.getFrameTree"))["frameTree"]["frame"]["id"]
    return (await session.send("Page.createIsolatedWorld", {"frameId": frame}))["executionContextId"]


async def _settle(session: Any) -> None:
    """Waits for fonts and takes animations to their end."""
    await session.send(
        "Runtime.evaluate",
        {"expression": _SETTLE, "contextId": await _own_world(session), "awaitPromise": True},
    )


_SEEDED_RANDOM = """
(() => {
  let state = 1;
  Math.random = () => {  // mulberry32
    state = (state + 0x6D2B79F5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
})();
"""

# Waits for fonts, then takes every animation to its end, or to its beginning if it has none.
_SETTLE = """
document.fonts.ready.then(() => {
  for (const animation of document.getAnimations()) {
    try { animation.finish(); } catch { animation.cancel(); }
  }
  const style = document.createElement('style');
  style.textContent = '*, *::before, *::after { transition: none !important; caret-color: transparent !important; }';
  document.documentElement.append(style);
})
"""

# ([width, height], node, ...) -> for each node the box [x1, y1, x2, y2] of its visible part, or null. A node is seen if
# something of it lies in the viewport and in the ancestors that cut off what overflows them, and if it, its
# descendants or, for text, its parent are hit at five points of that part.
_SEEN_PARTS = """
function (viewport, byContents, ...nodes) {
  const style = document.createElement('style');
  style.textContent = '* { pointer-events: auto !important; }';
  document.documentElement.append(style);
  const view = visualViewport;  // a phone shows a page made for desktops smaller than it is
  const hit = (x, y) => {
    let found = document.elementFromPoint(x, y);
    while (found && found.shadowRoot) {
      const inner = found.shadowRoot.elementFromPoint(x, y);
      if (!inner || inner === found) break;
      found = inner;
    }
    return found;
  };
  const up = (node) => node.parentElement || (node.getRootNode() && node.getRootNode().host) || null;
  const within = (node, ancestor) => {
    for (let current = node; current; current = up(current)) if (current === ancestor) return true;
    return false;
  };
  const seen = (node, index) => {
    const element = node.nodeType === Node.ELEMENT_NODE ? node : up(node);
    if (!element || !element.checkVisibility({ opacityProperty: true, visibilityProperty: true })) return null;
    let measured = node;
    if (node !== element || byContents[index]) {
      measured = document.createRange();
      measured.selectNodeContents(node);
    }
    const rect = measured.getBoundingClientRect();
    let [x1, y1, x2, y2] = [rect.left, rect.top, rect.right, rect.bottom];
    let [cutX1, cutY1] = [view.offsetLeft, view.offsetTop];
    let [cutX2, cutY2] = [cutX1 + viewport[0] / view.scale, cutY1 + viewport[1] / view.scale];
    for (let current = node === element ? up(element) : element; current; current = up(current)) {
      const computed = getComputedStyle(current);
      if (current === document.body || current === document.documentElement) continue;
      if (computed.overflowX === 'visible' && computed.overflowY === 'visible') continue;
      const frame = current.getBoundingClientRect();
      [cutX1, cutY1] = [Math.max(cutX1, frame.left), Math.max(cutY1, frame.top)];
      [cutX2, cutY2] = [Math.min(cutX2, frame.right), Math.min(cutY2, frame.bottom)];
    }
    [x1, y1] = [Math.max(x1, cutX1), Math.max(y1, cutY1)];
    [x2, y2] = [Math.min(x2, cutX2), Math.min(y2, cutY2)];
    if (x2 - x1 < 3 || y2 - y1 < 3) return null;
    for (const [along, down] of [[0.5, 0.5], [0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]) {
      const found = hit(x1 + along * (x2 - x1), y1 + down * (y2 - y1));
      if (!found || !within(found, element)) return null;
    }
    const [left, top] = [view.offsetLeft, view.offsetTop];
    return [x1 - left, y1 - top, x2 - left, y2 - top].map((value) => value * view.scale);
  };
  const boxes = nodes.map(seen);
  style.remove();
  return boxes;
}
"""
