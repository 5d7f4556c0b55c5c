"""Write the golden tables again, for `make te-tables`."""

import tests.te.stand_in  # noqa: F401  before megatron-core

# isort: split

import csv

from model.transformer_engine import TransformerEngineSpecProvider
from tests.te.fake_ranks import CASES, RANKS, built
from tests.te.tables import folded, rows, shards, write
from tests.te.test_fp8 import IN_FP8, counted, golden, kept_in_fp8, weights_table

if __name__ == "__main__":
    for preset, rank in CASES:
        with built(preset, RANKS[rank], TransformerEngineSpecProvider()) as model:
            write(f"{preset}_{rank}", folded(rows(model, shards(model))))
    for preset, rank, recipe in IN_FP8:
        with golden(preset, rank, recipe).open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["parameter", "class", "shape", "scales", "number"])
            writer.writerows(counted(weights_table(preset, rank, kept_in_fp8(recipe))))
