"""A headless Chromium that takes screenshots of local pages and locates their elements.

Pages are not trusted. Only files under a given folder are loaded, nothing is downloaded, dialogs and second windows end
the page, and every page has a time limit. The browser's profile is new and is deleted with the browser.

The same page gives the same image: one device pixel per CSS pixel, a clock that advances only by the two seconds given
to the page's timers, random numbers from a fixed seed, finished animations, no caret.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from data_pipeline.errors import BadSample, DataError
from data_pipeline.inputs.grounding.elements import settle, visible_elements
from data_pipeline.inputs.grounding.screen import Screen, Viewport

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--blink-settings=imageAnimationPolicy=2",  # animated images show their first frame
)
PAGE_TIME = 1_704_110_400  # seconds; 1 January 2024, noon UTC
TIMERS_MS = 2000  # how far a page's clock advances before the screenshot
_CLOSE_SECONDS = 10

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


class Chromium:
    """A browser. It starts when it is first needed, and again after a page made it unusable."""

    def __init__(self, executable: str = "", *, java_script: bool = True, time_limit: float = 20.0) -> None:
        """Set the options of a browser that is not started yet.

        Args:
            executable: Path or name of the program; empty: the first of CHROMIUM_NAMES on the PATH.
            java_script: Whether the scripts of pages run.
            time_limit: Seconds per page.
        """
        self.executable, self.java_script, self.time_limit = executable, java_script, time_limit
        self._runner = asyncio.Runner()
        self._home = ""  # the folder that the browser may write to
        self._driver: Any = None
        self._browser: Any = None

    def screenshot(self, page: Path, root: Path, viewport: Viewport) -> Screen:
        """Return the page as the viewport shows it, loading nothing from outside the folder `root`.

        Raises:
            DataError: The browser cannot be started.
            BadSample: page_timeout, page_failed, or hostile_page: the page opened a dialog or a window, navigated to
                another page, or started a download.
        """
        return self._runner.run(self._screenshot(page, root, viewport))

    def close(self) -> None:
        """Stop the browser."""
        self._runner.run(self._stop())
        self._runner.close()

    async def _screenshot(self, page: Path, root: Path, viewport: Viewport) -> Screen:
        browser = await self._started()
        context = await _new_context(browser, root, viewport, self.java_script)
        try:
            async with asyncio.timeout(self.time_limit):
                return await _show(context, page, viewport, self.java_script)
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
            raise DataError("screenshots of web pages need playwright: pip install -e '.[gui]'") from error
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
        """Close a page's context, which ends its process too. If that fails, stop the browser."""
        from playwright.async_api import Error

        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await context.close()
        except (TimeoutError, Error):
            await self._stop()

    async def _stop(self) -> None:
        """Stop the browser whatever its pages do. The driver kills a browser that does not answer."""
        browser, self._browser = self._browser, None
        driver, self._driver = self._driver, None
        home, self._home = self._home, ""
        if browser is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await browser.close()
        if driver is not None:
            await driver.stop()
        if home:
            shutil.rmtree(home, ignore_errors=True)


def find_chromium(executable: str = "") -> str:
    """Return the path of the browser's program.

    Raises:
        DataError: It is not installed. The message says how to install or name it.
    """
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
        await context.clock.install(time=PAGE_TIME)
        await context.clock.pause_at(PAGE_TIME + 1)
        await context.add_init_script(_SEEDED_RANDOM)
    return context


async def _show(context: Any, page: Path, viewport: Viewport, java_script: bool) -> Screen:
    """Open the page in a new tab and capture it, or raise BadSample at its first violation."""
    from playwright.async_api import Error

    tab = await context.new_page()
    violation = _first_violation(context, tab)
    work = asyncio.ensure_future(_capture(context, tab, page, viewport, java_script))
    try:
        either: tuple[asyncio.Future[Any], ...] = (work, violation)
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if violation.done():
            raise BadSample("hostile_page", f"{page.name} {violation.result()}")
        return work.result()
    except Error as error:
        raise BadSample("page_failed", f"{page.name}: {error.message.splitlines()[0]}") from error
    finally:
        work.cancel()
        violation.cancel()


async def _capture(context: Any, tab: Any, page: Path, viewport: Viewport, java_script: bool) -> Screen:
    await tab.goto(page.resolve().as_uri(), wait_until="load", timeout=0)
    if java_script:
        await tab.clock.run_for(TIMERS_MS)
    session = await context.new_cdp_session(tab)
    await settle(session)
    png = await tab.screenshot(type="png", animations="allow", caret="hide", timeout=0)
    return Screen(png, await visible_elements(session, viewport))


def _only_under(root: Path) -> Any:
    """Return a handler of requests that allows only files under this folder, with links resolved."""

    async def handle(route: Any) -> None:
        url = urlsplit(route.request.url)
        allowed = url.scheme in ("data", "blob")
        if url.scheme == "file" and not url.netloc:
            try:
                allowed = Path(unquote(url.path)).resolve().is_relative_to(root)
            except (OSError, ValueError):
                allowed = False
        with suppress(Exception):  # the page was closed meanwhile
            await (route.continue_() if allowed else route.abort())

    return handle


def _first_violation(context: Any, tab: Any) -> asyncio.Future[str]:
    """Return a future that is done when the page does what no harmless page does; its result says what."""
    violation: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    navigations: list[str] = []

    def report(what: str) -> None:
        if not violation.done():
            violation.set_result(what)

    def on_request(request: Any) -> None:
        if request.is_navigation_request() and request.frame == tab.main_frame:
            navigations.append(request.url)
            if len(navigations) > 1:
                report(f"went to {request.url[:100]}")

    tab.on("dialog", lambda dialog: report(f"opened a dialog ({dialog.type})"))
    tab.on("download", lambda _: report("started a download"))
    tab.on("request", on_request)
    context.on("page", lambda _: report("opened a window"))
    return violation
