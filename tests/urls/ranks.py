"""What the processes of tests/urls/test_object_stores.py do."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch.distributed as dist

from common import storage
from common.storage import StorageError
from model.config import GlmvConfig
from model.errors import ConfigError, WeightsError
from model.glmv import GlmvModel
from model.parallel import ParallelConfig
from model.process_groups import initialize_model_parallel
from model.weights import remote
from model.weights.formats.opened import open_folder
from model.weights.load import load_weights, local_tensors
from model.weights.remote import hf_folder
from model.weights.source import WeightSource

ERRORS = (ConfigError, WeightsError, StorageError)  # what commands and runs report in one line


def tensors(
    place: str, config: GlmvConfig, parallel: ParallelConfig, environments: list[dict[str, str]]
) -> dict[str, np.ndarray]:
    """Return what this rank holds after loading from a folder or a URL, with an environment of its own."""
    os.environ.update(environments[dist.get_rank()])
    initialize_model_parallel(parallel, seed=0)
    model = GlmvModel(config, parallel)
    dist.barrier()
    load_weights([model], open_folder(hf_folder(place)).source)
    return {name: tensor.numpy() for name, tensor in local_tensors(model)}


def outcome(place: str, environment: dict[str, str], ready: Path | None = None, go: Path | None = None) -> str:
    """Return the error that ends reading all tensors of a folder; empty: none. The first rank reads.

    Args:
        place: Of the folder.
        environment: Of the process that reads, a new one: file systems look at it once.
        ready: Is written when the folder is open.
        go: Is waited for before the values are read.
    """
    if dist.get_rank() != 0:
        return ""
    here, there = multiprocessing.get_context("fork").Pipe()
    work = partial(_read_all, place, ready, go)
    process = multiprocessing.get_context("fork").Process(target=_answer, args=(there, environment, work))
    process.start()
    there.close()
    try:
        said: str = here.recv()
    finally:
        process.join()
    return said


def _answer(pipe: Connection, environment: dict[str, str], work: Callable[[], None]) -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "HF_TOKEN"))]:
        del os.environ[name]
    os.environ.update({**environment, "AWS_MAX_ATTEMPTS": "1"})  # AWS's client pauses too, between 5 attempts
    storage.DELAYS, remote.CHECK_SECONDS = (0.0, 0.0), 0.0
    time.sleep = lambda seconds: None  # the Hub's client waits 23 seconds before it gives up
    try:
        work()
        pipe.send("")
    except ERRORS as error:
        kind = next(kind for kind in ERRORS if isinstance(error, kind))
        pipe.send(f"{kind.__name__}: {error}")


def _read_all(place: str, ready: Path | None, go: Path | None) -> None:
    source: WeightSource = open_folder(hf_folder(place)).source
    names = source.names()
    source.rows(names[0], 0, 1)
    if ready and go:
        ready.touch()
        while not go.exists():
            pass
    for name in names:
        source.rows(name, 0, (*source.shape(name), 1)[0])
