"""Statistics of shards, from their indexes alone: a table by domain, and a plot of lengths, sizes, durations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogFormatter, MaxNLocator
from rich.box import SIMPLE_HEAD
from rich.filesize import decimal
from rich.table import Column, Table

from data_pipeline.domains import DOMAINS
from data_pipeline.errors import DataError
from data_pipeline.loading.source import sample_lengths
from data_pipeline.media.pixel_budget import PixelBudget
from data_pipeline.shards.index import ShardIndex

_BINS = 60
_NOTHING = np.empty(0)


@dataclass
class DomainStats:
    """One domain, summed over shards. Each list has one array per shard."""

    tokens: list[np.ndarray] = field(default_factory=list)  # tokens of every sample, image tokens included
    sizes: list[np.ndarray] = field(default_factory=list)  # (height, width) of every image before resizing
    durations: list[np.ndarray] = field(default_factory=list)  # seconds of every video
    bytes: int = 0  # of all members

    def row(self) -> list[str]:
        """Return the cells of COLUMNS."""
        tokens, durations = (np.concatenate([_NOTHING, *arrays]) for arrays in (self.tokens, self.durations))
        counts = (len(tokens), sum(map(len, self.sizes)), len(durations), tokens.sum())
        percentiles = np.percentile(tokens, (50, 99, 100), method="inverted_cdf") if len(tokens) else (0, 0, 0)
        return [*(f"{int(count):,}" for count in (*counts, *percentiles)), decimal(self.bytes)]


COLUMNS = ("samples", "images", "videos", "tokens", "median", "p99", "longest", "bytes")


def collect(shards: Iterable[ShardIndex], budget: PixelBudget) -> dict[str, DomainStats]:
    """Return the statistics of each domain present, in the order of DOMAINS."""
    found: dict[str, DomainStats] = {}
    for shard in shards:
        lengths = sample_lengths(shard.table, budget)
        for domain in pc.unique(shard.table.column("domain")).to_pylist():
            here = pc.equal(shard.table.column("domain"), domain)
            rows = shard.table.filter(here)
            stats = found.setdefault(domain, DomainStats())
            stats.tokens.append(lengths[here.to_numpy()])
            images, videos, members = (_flat(rows, column) for column in ("images", "videos", "members"))
            stats.sizes.append(np.stack([_numbers(images, "height"), _numbers(images, "width")], axis=1))
            stats.durations.append(_numbers(videos, "duration"))
            stats.bytes += int(_numbers(members, "size").sum())
    return {domain: found[domain] for domain in DOMAINS if domain in found}


def table_of(stats: dict[str, DomainStats]) -> Table:
    """Return the table to print."""
    columns = (Column(name, justify="right", no_wrap=True) for name in COLUMNS)
    table = Table(Column("domain", no_wrap=True), *columns, box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for domain, of_domain in stats.items():
        table.add_row(domain, *of_domain.row())
    return table


def draw(stats: dict[str, DomainStats], out: Path) -> None:
    """Draw four panels into an image file. Raises DataError if the suffix of `out` is no known format."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    kinds = figure.canvas.get_supported_filetypes()
    if out.suffix.lstrip(".").lower() not in kinds:
        raise DataError(f"--plot {out}: its name must end in one of {', '.join(sorted(kinds))}")
    shares, tokens, sizes, durations = figure.subplots(2, 2).ravel()
    colours = {domain: f"C{DOMAINS.index(domain)}" for domain in stats}

    totals = {domain: sum(part.sum() for part in of_domain.tokens) for domain, of_domain in stats.items()}
    shares.barh(list(totals), list(totals.values()), color=list(colours.values()))
    shares.set(title="tokens", xlabel="tokens")
    shares.xaxis.set_major_formatter(EngFormatter(sep=""))  # 250k, 4M
    shares.invert_yaxis()

    _histograms(tokens, {domain: of_domain.tokens for domain, of_domain in stats.items()}, colours)
    tokens.set(title="length", xlabel="tokens per sample", ylabel="samples")

    images = sum(len(part) for of_domain in stats.values() for part in of_domain.sizes)
    markersize = 6 if images < 1000 else 2
    for domain, of_domain in stats.items():
        height, width = np.concatenate([np.empty((0, 2)), *of_domain.sizes]).T
        dots = {"markersize": markersize, "alpha": 0.4, "color": colours[domain], "rasterized": True}
        sizes.plot(width, height, ".", label=domain if len(width) else None, **dots)
    sizes.set(title="images", xlabel="width", ylabel="height", xscale="log", yscale="log")
    _plain_numbers(sizes.xaxis, sizes.yaxis)
    if images:
        sizes.legend(fontsize="small", markerscale=2)

    _histograms(durations, {domain: of_domain.durations for domain, of_domain in stats.items()}, colours)
    durations.set(title="videos", xlabel="seconds", ylabel="videos")
    figure.savefig(out, dpi=110)


def _histograms(panel: Axes, values: dict[str, list[np.ndarray]], colours: dict[str, str]) -> None:
    """Draw one line per domain, over bins that grow by a constant factor."""
    joined = {domain: np.concatenate([_NOTHING, *parts]) for domain, parts in values.items()}
    present = {domain: part[part > 0] for domain, part in joined.items() if (part > 0).any()}
    if not present:
        panel.text(0.5, 0.5, "none", ha="center", transform=panel.transAxes)
        return
    low, high = min(part.min() for part in present.values()), max(part.max() for part in present.values())
    bins = np.geomspace(low * 0.99, high * 1.01, _BINS).tolist()
    for domain, part in present.items():
        panel.hist(part, bins=bins, histtype="step", color=colours[domain], label=domain)
    panel.set_xscale("log")
    _plain_numbers(panel.xaxis)
    panel.yaxis.set_major_locator(MaxNLocator(integer=True))
    panel.legend(fontsize="small")


def _plain_numbers(*axes: Axis) -> None:
    """Write 300 in place of 3 x 10^2 on logarithmic axes."""
    for axis in axes:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))


def _flat(rows: pa.Table, column: str) -> pa.StructArray:
    return rows.column(column).combine_chunks().flatten()


def _numbers(structs: pa.StructArray, name: str) -> np.ndarray:
    return structs.field(name).to_numpy(zero_copy_only=False).astype(np.float64)
