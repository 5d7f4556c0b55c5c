"""What a plan takes from every domain and every source, before anything is read.

domain        samples  too long    tokens  share  patches
interleaved       212         3   713,442  68.1%  310,128
text              148         0   334,110  31.9%        0
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from data_pipeline.plan.blend import SourceTable, image_share
from data_pipeline.plan.plan import Pack


@dataclass
class DomainShare:
    """What some packs take from one domain."""

    samples: int = 0  # that begin in these packs
    tokens: int = 0
    patches: int = 0
    too_long: int = 0  # samples that do not fit a sequence


@dataclass(frozen=True)
class SourceUse:
    """How fast the first steps of a plan use up one source."""

    label: str
    samples: int  # in the source
    samples_per_step: float  # on average
    repeats_per_step: float  # how often one step uses each sample that is used at all

    @property
    def is_repeated(self) -> bool:
        """Whether the source is smaller than a step, so that samples come several times in it."""
        return self.repeats_per_step > 1


def planned_mixture(sources: Sequence[SourceTable], packs: Iterable[Pack]) -> dict[str, DomainShare]:
    """Return the share of every domain in `packs`, the domain with the most tokens first."""
    shares: dict[str, DomainShare] = defaultdict(DomainShare)
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
            shares[sources[piece.source].domain_of(piece.row)].too_long += 1
    return dict(sorted(shares.items(), key=lambda item: (-item[1].tokens, item[0])))


def too_long_share(shares: dict[str, DomainShare]) -> float:
    """Return which share of all samples does not fit a sequence, from 0 to 1."""
    too_long = sum(share.too_long for share in shares.values())
    return too_long / max(too_long + sum(share.samples for share in shares.values()), 1)


def mixture_table(shares: dict[str, DomainShare]) -> str:
    """Return the shares as lines of text, as in the example of the module."""
    tokens = max(sum(share.tokens for share in shares.values()), 1)
    rows = [["domain", "samples", "too long", "tokens", "share", "patches"]]
    for domain, share in shares.items():
        counts = [f"{n:,}" for n in (share.samples, share.too_long, share.tokens)]
        rows.append([domain, *counts, f"{share.tokens / tokens:.1%}", f"{share.patches:,}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *numbers in rows:
        cells = [name.ljust(widths[0])]
        cells += [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def source_use(sources: Sequence[SourceTable], steps: Sequence[Sequence[Pack]]) -> list[SourceUse]:
    """Return how often these steps use the samples of each source.

    Args:
        sources: The sources of the plan.
        steps: All steps of the plan's first window. Later windows may contain the end of one epoch and the beginning of
            the next, in which a sample comes twice although the source is larger than a step.

    Returns:
        One entry per source, in their order.
    """
    begun = Counter(
        (piece.source, piece.row) for packs in steps for pack in packs for piece in pack.pieces if piece.start == 0
    )
    samples, distinct = [0] * len(sources), [0] * len(sources)
    for (index, _), count in begun.items():
        samples[index] += count
        distinct[index] += 1
    uses = []
    for index, source in enumerate(sources):
        per_step = samples[index] / max(len(steps), 1)
        repeats = per_step / max(distinct[index], 1)
        uses.append(SourceUse(source.label, len(source.lengths), per_step, repeats))
    return uses
