"""What a plan takes from every domain, before anything is read.

domain        samples  set aside    tokens  share  patches
interleaved       212          3   713,442  68.1%  310,128
text              148          0   334,110  31.9%        0
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from data_pipeline.plan.blend import SourceTable, image_share
from data_pipeline.plan.plan import Pack


@dataclass
class Share:
    """samples: those that begin in these packs; set_aside: those that do not fit a sequence."""

    samples: int = 0
    tokens: int = 0
    patches: int = 0
    set_aside: int = 0


def planned_mixture(sources: Sequence[SourceTable], packs: Iterable[Pack]) -> dict[str, Share]:
    """By domain, those with most tokens first."""
    shares: dict[str, Share] = defaultdict(Share)
    for pack in packs:
        for piece in pack.pieces:
            source = sources[piece.source]
            share = shares[source.domain_of(piece.row)]
            share.samples += piece.start == 0
            share.tokens += piece.length
            patches = int(source.patches[piece.row])
            if piece.length < source.lengths[piece.row] and patches:
                patches = int(patches * image_share(source.blocks(piece.row), piece.start, piece.length))
            share.patches += patches
        for piece in pack.too_long:
            shares[sources[piece.source].domain_of(piece.row)].set_aside += 1
    return dict(sorted(shares.items(), key=lambda item: (-item[1].tokens, item[0])))


def set_aside_share(shares: dict[str, Share]) -> float:
    """Of all samples, those that do not fit a sequence."""
    lost = sum(share.set_aside for share in shares.values())
    return lost / max(lost + sum(share.samples for share in shares.values()), 1)


def mixture_table(shares: dict[str, Share]) -> str:
    """The shares as lines of text: see the module."""
    tokens = max(sum(share.tokens for share in shares.values()), 1)
    rows = [
        (
            domain,
            *(f"{n:,}" for n in (of.samples, of.set_aside, of.tokens)),
            f"{of.tokens / tokens:.1%}",
            f"{of.patches:,}",
        )
        for domain, of in shares.items()
    ]
    rows.insert(0, ("domain", "samples", "set aside", "tokens", "share", "patches"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
