"""How others come from shards of pictures to patches; `benchmarks.pictures` runs this file with their interpreter.

    .venv-peers/bin/python benchmarks/picture_peers.py CONTENDER FOLDER SAMPLES

Prints one line of JSON: samples, patches made of them, and the CPU seconds taken after a few samples to warm up.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from itertools import batched, islice
from pathlib import Path
from typing import Any

WARM_UP = 16
SIZE = {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 2 * 6144}


def webdataset_pictures(folder: Path) -> Iterator[Any]:
    import webdataset

    shards = sorted(str(path) for path in folder.glob("*.tar"))
    return (sample["jpg"] for sample in webdataset.WebDataset(shards, shardshuffle=False).decode("pilrgb"))


def energon_pictures(folder: Path) -> Iterator[Any]:
    from megatron.energon import (
        Cooker,
        CrudeSample,
        DefaultTaskEncoder,
        SkipSample,
        WorkerConfig,
        basic_sample_keys,
        get_savable_loader,
        get_train_dataset,
        stateless,
    )
    return iter(())
