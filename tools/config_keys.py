"""Write the tables of configuration keys into docs/training.md and docs/rl.md, from the comments of the dataclasses.

    python -m tools.config_keys

A test compares the pages with what this writes. `make docs` runs it.
"""

from __future__ import annotations

from pathlib import Path

import typer

from common.files import write_text
from rl.config import RlConfig
from sft.train import SftConfig
from training.config import RunConfig
from training.keys import Key, keys_of, shown_value

DOCS = Path(__file__).parent.parent / "docs"
PAGE, RL_PAGE = DOCS / "training.md", DOCS / "rl.md"
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


def rl_table() -> str:
    """Return the table of the keys that only rl.train has, and of those with another default there, as Markdown."""
    of_runs = {key.name: key.default for key in keys_of(RunConfig)}
    rows = [
        f"| `{key.name}` | {shown_value(key.default)} | {key.meaning} |\n"
        for key in keys_of(RlConfig)
        if not key.is_section and (key.name not in of_runs or key.default != of_runs[key.name])
    ]
    return "| key | default | meaning |\n|---|---|---|\n" + "".join(rows)


def _defaults(key: Key, of_sft: object) -> str:
    shown = shown_value(key.default)
    return shown if of_sft == key.default else f"{shown}; sft {shown_value(of_sft)}"


def with_table(page: str, table: str) -> str:
    """Return the text of a page with a table between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main() -> None:
    """Write the tables of configuration keys into docs/training.md and docs/rl.md."""
    for page, made in ((PAGE, table()), (RL_PAGE, rl_table())):
        write_text(page, with_table(page.read_text(), made))


if __name__ == "__main__":
    typer.run(main)
