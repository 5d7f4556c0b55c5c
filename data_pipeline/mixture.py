"""What a plan takes from every domain: samples, tokens and patches of its first steps, before anything is read."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import islice

from data_pipeline.draw import image_share
from data_pipeline.plan import Plan, Position


@dataclass
class Share:
    """samples: those that begin in these steps; set_aside: those that do not fit a sequence."""

    samples: int = 0
    tokens: int = 0
    patches: int = 0
    set_aside: int = 0


def planned_mixture(plan: Plan, steps: int) -> dict[str, Share]:
    """By domain, those with most tokens first."""
    shares: dict[str, Share] = defaultdict(Share)
    for packs, _ in islice(plan.steps(Position.start(len(plan.sources))), steps):
        for pack in packs:
            for piece in pack.pieces:
                source = plan.sources[piece.source]
                share = shares[source.domain_of(piece.row)]
                share.samples += piece.start == 0
                share.tokens += piece.length
                patches = int(source.patches[piece.row])
                if piece.length < source.lengths[piece.row] and patches:
                    patches = int(patches * image_share(source.blocks(piece.row), piece.start, piece.length))
                share.patches += patches
            for piece in pack.too_long:
                shares[plan.sources[piece.source].domain_of(piece.row)].set_aside += 1
    return dict(sorted(shares.items(), key=lambda item: (-item[1].tokens, item[0])))
