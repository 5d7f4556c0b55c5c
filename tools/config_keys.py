"""Write the table of configuration keys into docs/training.md, from the comments of the dataclasses.

    python -m tools.config_keys

A test compares the page with what this writes. `make docs` runs it.
"""

from __future__ import annotations

from pathlib import Path

import typer

from common.files import write_text
from sft.train import SftConfig
from training.config import RunConfig
from training.keys import Key, keys_of, shown_value

PAGE = Path(__file__).parent.parent / "docs" / "training.md"
BEGIN, END = "<!-- keys: written by tools.config_keys -->\n", "<!-- end of keys -->\n"


def table() -> str:
    """Return the table of all keys, as Markdown."""
    of_sft = {key.name: key.default for key in keys_of(SftConfig)}
    rows = [
        f"| `{key.name}` | {_defaults(key, of_sft[key.name])} | {key.meaning} |\n"
        for key in keys_of(RunConfig)
        if not key.is_section
    ]
    return "| key | default | meaning |\n|---|---|---|\n" + "".join(rows)


def _defaults(key: Key, of_sft: object) -> str:
    shown = shown_value(key.default)
    return shown if of_sft == key.default else f"{shown}; sft {shown_value(of_sft)}"


def with_table(page: str) -> str:
    """Return the text of a page with the table between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> None:
    """Write the table of configuration keys into docs/training.md."""
    write_text(PAGE, with_table(PAGE.read_text()))


if __name__ == "__main__":
    typer.run(main)
