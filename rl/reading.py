"""Reading the prompts of an iteration: every lead gets them all, and decodes the images and videos of its share.

read           every lead reads the files of all prompts and tokenises them; sizes of images come from their headers
decode         the leads share the prompts; a prompt that one of them cannot use is used by none
later          a lead decodes what else it trains on (`RolloutPrompt.decoded`)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from data_pipeline.domains.rl_record import RlRecord
from data_pipeline.errors import BadSample, UnusedSample
from model.process_groups import same_packs_group
from rl.prompts import PromptTable
from rl.rollouts import RolloutPrompt
from training.batch_broadcast import is_lead

Prompt: TypeAlias = tuple[int, RolloutPrompt, RlRecord]  # with its row
Unused: TypeAlias = dict[int, dict[str, Any]]  # lines of quarantine.jsonl, by row
Item = TypeVar("Item")
Result = TypeVar("Result")


def read_prompts(
    table: PromptTable, rows: np.ndarray, threads: int = 0, on_wait: Callable[[], None] = lambda: None
) -> tuple[list[Prompt], list[dict[str, Any]]]:
    """Read prompts on the lead of the processes that share packs; the others get them without media. Collective.

    A prompt that one lead cannot read, because storage fails for its machine alone, is used by none: all processes must
    ask for the same ones.

    Args:
        table: the prompts.
        rows: int64 [prompts], of the table.
        threads: that decode, on each lead; 0: the calling one.
        on_wait: called after each prompt. What it raises ends the reading of all processes.

    Returns:
        (row, prompt, record) of each prompt that can be used, and lines of quarantine.jsonl of the others. Every
        prompt has its patches on one lead: the usable ones are dealt to the leads in turn, but for those whose decoding
        failed.

    Raises:
        Interrupted: A lead waited for a lost shard when the run was asked to stop, or `on_wait` raised it. Raised on
            all processes, as is any other error of a lead.
    """
    prompts: list[Prompt] = []
    unused = _agree(lambda: _read(table, rows, prompts, on_wait))
    prompts = [each for each in prompts if each[0] not in unused]
    undecodable = _agree(lambda: _decode_share(prompts, threads, on_wait))
    prompts = [each for each in prompts if each[0] not in undecodable]
    group = same_packs_group()
    if group.size() > 1:
        sent: list[Any] = [[(row, _without_media(prompt), record) for row, prompt, record in prompts]]
        dist.broadcast_object_list(sent, src=dist.get_global_rank(group, 0), group=group)
        prompts = prompts if is_lead() else sent[0]
    unused |= undecodable
    return prompts, [unused[row] for row in sorted(unused)]


def _read(table: PromptTable, rows: np.ndarray, prompts: list[Prompt], on_wait: Callable[[], None]) -> Unused:
    """Read and tokenise all prompts, and return those that cannot be used."""
    unused: Unused = {}
    for row in rows.tolist():
        try:
            prompts.append((row, *table.read(row)))
        except BadSample as error:
            unused[row] = unused_prompt(table.facts.ids[row], error.reason, error.detail)
        on_wait()
    return unused


def _decode_share(prompts: list[Prompt], threads: int, on_wait: Callable[[], None]) -> Unused:
    """Decode this lead's share in place, and return those that cannot be decoded."""
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    share = range(rank, len(prompts), ranks)
    unused: Unused = {}
    found = in_threads(_decoded_or_error, [prompts[number][1] for number in share], threads)
    for number, decoded in zip(share, found, strict=True):
        row, prompt, record = prompts[number]
        if isinstance(decoded, BadSample):
            unused[row] = unused_prompt(prompt.id, decoded.reason, decoded.detail)
        else:
            prompts[number] = (row, decoded, record)
        on_wait()
    return unused


def _decoded_or_error(prompt: RolloutPrompt) -> RolloutPrompt | BadSample:
    try:
        return prompt.decoded()
    except BadSample as error:
        return error


def in_threads(work: Callable[[Item], Result], items: Sequence[Item], threads: int) -> Iterator[Result]:
    """Yield what `work` returns for each item, in order, from this many threads; 0: from the calling one."""
    if not threads:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(threads)
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(cancel_futures=True)


def _agree(work: Callable[[], Unused]) -> Unused:
    """Let the leads work, and return what some of them cannot use; raise on all what one of them raises. Collective."""
    own: Unused = {}
    failure: Exception | None = None
    if is_lead():
        try:
            own = work()
        except Exception as error:  # the other processes wait
            failure = error
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (own, failure))
    if failures := [failed for _, failed in everyone if failed is not None]:
        raise failures[0]
    return _merged(lines for lines, _ in reversed(everyone))


def _merged(parts: Iterable[Unused]) -> Unused:
    return {row: line for lines in parts for row, line in lines.items()}


def unused_prompt(prompt_id: str, reason: str, detail: str) -> dict[str, Any]:
    """Return a line of quarantine.jsonl.

    Args:
        prompt_id: "shard.tar/KEY".
        reason: one word.
        detail: what happened.
    """
    shard, _, key = prompt_id.partition("/")
    return UnusedSample(reason, detail, shard=shard, key=key).as_json()


def _without_media(prompt: RolloutPrompt) -> RolloutPrompt:
    sample = replace(prompt.sample, patches=torch.empty(0, prompt.sample.patches.size(1), dtype=torch.uint8))
    return replace(prompt, sample=sample, images=(), videos=(), undecoded=None)
