"""Pages printed by a real browser: Debian's chromium, without window and network."""

from __future__ import annotations

import subprocess
from pathlib import Path


def print_to_pdf(html: Path, pdf: Path, *, heads: bool = False) -> None:
    """Print a page. heads: with chromium's page headers and footers: date, title, address and page number."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    profile = f"--user-data-dir={html.parent / 'profile'}"
    subprocess.run(
        ["chromium", *options, profile, *([] if heads else ["--no-pdf-header-footer"]), f"--print-to-pdf={pdf}", html],
        check=True,
        capture_output=True,
        timeout=120,
    )
