"""What the processes of tests/rl/test_rollout_manager.py run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.errors import Interrupted
from model.process_groups import initialize_model_parallel
from rl.prompts import PromptTable
from rl.reading import read_prompts
from rl.waiting import patient_group, work_together
from tests.model.layout_cases import layout_of

ROWS = [2, 0, 1, 0]


def read(folders: Sequence[str], tokenizer: str, layout: str, lost: bool = False) -> Any:
    """Read prompts, on each process from a folder of its own; with `lost`, the last process stops to wait for its."""
    initialize_model_parallel(layout_of(layout)[0], 1)
    rank = dist.get_rank()
    source = SourceConfig(folders[rank], name="dots")
    config = DataConfig(
        tokenizer=tokenizer, sources=[source], retry_seconds=60.0 * lost, on_lost_shard="quarantine", cache_dir=""
    )
    table = PromptTable(config, chat_form="glm45v", max_tokens=1000)
    if lost and rank == len(folders) - 1:
        for tar in Path(folders[rank]).glob("*.tar"):
            tar.unlink()
        table.stop_waiting()
    try:
        prompts, unused = read_prompts(table, np.array(ROWS))
    except Interrupted:
        return "interrupted"
    return [(row, prompt.id, len(prompt.sample.patches), len(prompt.images)) for row, prompt, _ in prompts], unused


def read_and_decode(folder: str, tokenizer: str, layout: str, threads: int) -> Any:
    """Read all prompts of a folder; return which have patches at once, and all as samples once they are decoded."""
    initialize_model_parallel(layout_of(layout)[0], 1)
    config = DataConfig(tokenizer=tokenizer, sources=[SourceConfig(folder, name="dots")], cache_dir="")
    table = PromptTable(config, chat_form="glm45v", max_tokens=1000)
    prompts, unused = read_prompts(table, np.arange(len(table)), threads)
    at_once = [prompt.undecoded is None for _, prompt, _ in prompts]
    return at_once, [vars(prompt.decoded().sample) for _, prompt, _ in prompts], unused


def give_up(rank: int, after: int) -> tuple[str, int]:
    """Work in steps on every process; the one of this rank is asked to stop after some. Return what became of it."""
    steps: list[None] = []

    def on_wait() -> None:
        if dist.get_rank() == rank and len(steps) >= after:
            raise Interrupted("asked to stop")

    def work() -> None:
        for _ in range(10):
            steps.append(None)
            on_wait()

    try:
        work_together(patient_group(), work, on_wait)
    except Interrupted:
        return "interrupted", len(steps)
    return "done", len(steps)


def wait_for_the_last(seconds: float) -> int:
    """Let the last process come late; return how often this one noted that it waits."""
    calls: list[None] = []
    group = patient_group()
    last = dist.get_rank() == dist.get_world_size() - 1
    work_together(group, lambda: time.sleep(seconds * last), lambda: calls.append(None))
    return len(calls)
