"""Write the golden tables again, for `make te-tables`."""

import tests.te.stand_in  # noqa: F401  before megatron-core

# isort: split

from model.transformer_engine import TransformerEngineSpecProvider
from tests.te.fake_ranks import CASES, RANKS, built
from tests.te.tables import folded, rows, shards, write

if __name__ == "__main__":
    for preset, rank in CASES:
        with built(preset, RANKS[rank], TransformerEngineSpecProvider()) as model:
            write(f"{preset}_{rank}", folded(rows(model, shards(model))))
