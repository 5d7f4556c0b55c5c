"""What the processes of tests/rl/test_rolls.py run."""

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
from rl.rolls import read_prompts
from rl.waiting import patient_group, wait_for_all
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


def wait_for_the_last(seconds: float) -> int:
    """Let the last process come late; return how often this one noted that it waits."""
    calls: list[None] = []
    group = patient_group()
    if dist.get_rank() == dist.get_world_size() - 1:
        time.sleep(seconds)
    wait_for_all(group, lambda: calls.append(None))
    return len(calls)
