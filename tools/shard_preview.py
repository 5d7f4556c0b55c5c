"""What `tools.shard build --dry-run` prints: one sample of each kind, every name, and the command to change it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from data_pipeline.inputs.draft import Input
from data_pipeline.sample import Element, Image, Text, Token, Video
from data_pipeline.sharding.preview import Preview, Seen, options_of, preview
from tools.prompt_check import check_prompt
from tools.shard_report import console, named, print_line

SHOWN_CHARACTERS = 600  # of a sample
SHOWN_NAMES = 40  # of the names of an input


def print_preview(inputs: Sequence[tuple[str, Input]], skipped: Counter[str], chat_form: str) -> bool:
    """Print what each input is taken for. Returns whether a sample could be made of any."""
    found = [(preview(kind, given, chat_form, check_prompt), given) for kind, given in inputs]
    for seen, given in found:
        _print_input(seen, given)
    if skipped:
        print_line(f"not read: {named(skipped)}: give these files with --input, with --kind where needed")
    print_line("dry run: nothing is written")
    return any(seen.samples for seen, _ in found)


def _print_input(seen: Preview, given: Input) -> None:
    more = f" and {len(seen.paths) - 1:,} more" if len(seen.paths) > 1 else ""
    console.print(f"[bold]{escape(seen.paths[0])}{more}[/bold]: kind {seen.kind}", soft_wrap=True)
    for domain, example in seen.samples.items():
        print_line(f"a sample of domain {domain}, from {example.draft.origin} (bold: with loss):")
        console.print(f"  {_rendered(example)}", soft_wrap=True, highlight=False)
    if (names := _names(seen)).row_count:
        console.print(names)
    for reason, first in seen.examples.items():
        print_line(f"rejected as {reason}: {seen.rejected[reason]:,}, first {first.origin}: {first.detail}")
    options = " ".join(f"--set {option}" for option in options_of(given))
    print_line(f"change it with: --kind {seen.kind} {options}".rstrip())


def _names(seen: Preview) -> Table:
    """Return the table of the names in an input, and what becomes of them."""
    table = Table("name", "becomes", f"in the first {seen.seen:,}")
    rows: list[tuple[str, str, int]] = []
    for name, count in sorted(seen.read.items()):
        given, arrow, became = name.partition(" -> ")
        rows.append((given, became if arrow else "read", count))
    rows += [(name, "stored, not used", count) for name, count in sorted(seen.unused.items())]
    rows += [(name, "not read", count) for name, count in sorted((+seen.not_read).items())]
    for name, became, count in rows[:SHOWN_NAMES]:
        table.add_row(escape(name), escape(became), f"{count:,}")
    if len(rows) > SHOWN_NAMES:
        table.add_row(f"and {len(rows) - SHOWN_NAMES:,} more", "", "")
    return table


def _rendered(seen: Seen) -> str:
    """Return a sample as one line of markup: bold is what is learned."""
    sizes, videos = iter(seen.sizes), iter(seen.draft.videos)
    written, shown = "", 0
    for element in seen.sample.elements:
        if shown > SHOWN_CHARACTERS:
            return f"{written} ..."
        if isinstance(element, Image):
            height, width = next(sizes)
            text = f"<image {width}x{height}>"
        elif isinstance(element, Video):
            text = f"<video {len(next(videos).data):,} bytes>"
        else:
            text = _text_of(element)[: SHOWN_CHARACTERS + 1 - shown]
        shown += len(text)
        learned = isinstance(element, Text | Token) and element.loss
        written += f"[bold]{escape(text)}[/bold]" if learned else escape(text)
    return written


def _text_of(element: Element) -> str:
    return element.text if isinstance(element, Text) else element.name if isinstance(element, Token) else ""
