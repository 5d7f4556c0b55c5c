"""`PackedLoader`: the packs of every step, in order, on this rank; stops and goes on exactly.

The plan runs here, in the training process, and costs little; data workers are told which samples to fetch and answer
in order. What has been fetched ahead is not part of the state: it is fetched again after a resume.

Workers are forked and never touch a GPU; packs are pinned, where there is one, by a thread of the training process.
"""

from __future__ import annotations

import os
import signal
import threading
import zlib
from collections import deque
from collections.abc import Iterator
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from data_pipeline.config import DataConfig
from data_pipeline.encoding.batch import Batch
from data_pipeline.encoding.tokenizer import GlmTokenizer
from data_pipeline.errors import DataError
from data_pipeline.loading.fetch import PackFetcher
from data_pipeline.loading.quarantine import Tally
from data_pipeline.loading.source import Source
from data_pipeline.loading.workers import NO_ANSWER, WorkerNotes, begin_worker, private, shared
from data_pipeline.media.pixel_budget import PixelBudget
from data_pipeline.plan.blend import Place
from data_pipeline.plan.mixture_report import Share, planned_mixture
from data_pipeline.plan.pack_cost import PackCost
from data_pipeline.plan.plan import Pack, Plan, Position
from data_pipeline.shards.shard_cache import ShardCache

STATE_FORMAT = 2


class PackedLoader:
    """Steps of packs, the same ones whatever the data-parallel size and worker count; endless unless every source has
    `epochs`.

    Rank r of n gets packs r, r+n, r+2n ... of the step's global_batch_size. tally: what the run has met so far; the
    caller, who knows of all ranks, adds to it. Raises DataError if the data cannot be used, naming the file or key and
    the mend.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seq_length: int,
        global_batch_size: int,
        cost: PackCost,
        data_parallel_rank: int,
        data_parallel_size: int,
    ):
        config.check()
        if global_batch_size % data_parallel_size:
            raise DataError(
                f"train.global_batch_size {global_batch_size} is not a multiple of the data-parallel size "
                f"{data_parallel_size}: change one of them"
            )
        self.tokenizer = GlmTokenizer(config.tokenizer)
        budget = PixelBudget(config.image_max_tokens, config.video_max_tokens)
        cache = ShardCache(config.cache_dir, config.cache_bytes)
        self.sources = [
            Source(source, tokenizer_hash=self.tokenizer.hash, budget=budget, cache=cache) for source in config.sources
        ]
        self.plan = Plan(
            self.sources,
            seed=config.seed,
            seq_length=seq_length,
            segment_multiple=config.segment_multiple,
            global_batch_size=global_batch_size,
            cost=cost,
            too_long=config.too_long,
        )
        self._rank, self._ranks = data_parallel_rank, data_parallel_size
        self._packs_per_rank = global_batch_size // data_parallel_size
        self._num_workers, self._prefetch = config.num_workers, config.prefetch
        self._pinned = torch.accelerator.is_available()
        self._notes = WorkerNotes(config.num_workers)
        self._fetcher = PackFetcher(
            *(self.sources, self.tokenizer, budget),
            seq_length=seq_length,
            segment_multiple=config.segment_multiple,
            cache=cache,
            notes=self._notes,
        )
        self.tally = Tally()
        self._position = Position.start(len(self.sources))
        self._positions_ahead: deque[Position] = deque()  # after each step whose packs the workers have been told of
        self._batches: Iterator[Batch | DataError] | None = None

    def next_step(self) -> list[Batch]:
        """This rank's packs of the next step, in order; none when all sources have used up their epochs."""
        if self._batches is None:
            self._batches = self._start()
        try:
            batches = [private(batch) for batch in islice(self._batches, self._packs_per_rank)]
        except (DataError, RuntimeError, *NO_ANSWER) as error:
            died = isinstance(error, NO_ANSWER) or str(error).startswith("DataLoader worker (pid")
            at = "".join(f" at {sample_id}" for sample_id in self._notes.of_the_dead()) if died else ""
            self.close()
            if not died:
                raise
            raise DataError(
                f"a data worker died{at} ({error}): look for a lack of memory, or set data.num_workers=0 to see it "
                "happen"
            ) from error
        if batches:
            self._position = self._positions_ahead.popleft()
        return batches

    def skip(self, steps: int) -> None:
        """Goes on so many steps later, and reads nothing of what lies between."""
        self.close()
        for _, position in islice(self.plan.steps(self._position), steps):
            self._position = position

    def planned_mixture(self) -> dict[str, Share]:
        """What the next steps take from every domain: all steps of the window that the next one lies in. From metadata
        alone."""
        steps, _ = self.plan.window(self._position)
        return planned_mixture(self.sources, chain.from_iterable(steps))

    def expected_work(self) -> tuple[list[int], list[int]]:
        """What the run's packs are like: tokens of every sample, and patches of every picture and frame pair, of the
        first MIN_WINDOW_PACKS packs. From metadata alone; the same on every rank and at every restart."""
        few = Plan(
            self.sources,
            seed=self.plan.seed,
            seq_length=self.plan.seq_length,
            segment_multiple=self.plan.segment_multiple,
            global_batch_size=1,  # a window is as wide as a step, which may be thousands of packs
            cost=self.plan.cost,
            too_long=self.plan.too_long,
        )
        steps, _ = few.window(Position.start(len(self.sources)))
        pieces = [piece for step in steps for pack in step for piece in pack.pieces]
        begun = [piece for piece in pieces if piece.start == 0]  # of a split sample the first piece stands for all
        patches = [n for piece in begun for n in self.sources[piece.source].image_patches(piece.row)]
        return [piece.length for piece in pieces], patches

    def state_dict(self) -> dict[str, Any]:
        """The position of the next step: counters, and what they count. Less than 1 kB of JSON with eight sources."""
        return {
            "format": STATE_FORMAT,
            "position": self._position.state(),
            "sources": {source.label: source.fingerprint for source in self.sources},
            "plan": self._plan_keys(),
            "tally": self.tally.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], *, allow_changes: bool = False) -> None:
        """Goes on where `state` was taken. Raises DataError if the plan would not be the same from there.

        With allow_changes, sources go on at their own counters, by name, and a new window begins there: up to a
        window's packs may come again, and a sample that was in pieces begins anew, as they may now be others. Token
        counts start afresh, so that a changed weight does not try to catch up.
        """
        self.close()
        if state.get("format") != STATE_FORMAT:
            raise DataError(
                "the checkpoint's position in the data was written by another version of this program: finish the run "
                "with that one, or begin another with model.init_from"
            )
        change = self._change(state)
        if change is None:
            self._position = Position.of(state["position"])
            self.tally.load_state_dict(state["tally"])
        elif allow_changes:
            places = dict(zip(state["sources"], Position.of(state["position"]).places, strict=True))
            self._position = Position(
                tuple(places.get(source.label, Place())._replace(parts=0, tokens=0) for source in self.sources)
            )
        else:
            raise DataError(f"{change} since the checkpoint: undo it, or set checkpoint.allow_changes=true")

    def close(self) -> None:
        """Stops the workers. The loader can be used again; it goes on at the next step."""
        self._batches = None
        self._positions_ahead.clear()

    def _plan_keys(self) -> dict[str, Any]:
        mixture = [(source.weight, source.epochs) for source in self.sources]
        return {
            "data.seed": self.plan.seed,
            "train.seq_length": self.plan.seq_length,
            "train.global_batch_size": self.plan.global_batch_size,
            "data.segment_multiple": self.plan.segment_multiple,
            "data.too_long": self.plan.too_long,
            "data.tokenizer": self.tokenizer.hash,
            "data.sources[].weight or epochs": f"{zlib.crc32(repr(mixture).encode()):08x}",
            "the cost of the model's parts": self.plan.cost.fingerprint,
        }

    def _change(self, state: dict[str, Any]) -> str | None:
        now = self.state_dict()
        before, after = state["sources"], now["sources"]
        if list(before) != list(after):
            return f"data.sources has changed from {', '.join(before)} to {', '.join(after)}"
        for key, value in now["plan"].items():
            if state["plan"].get(key) != value:
                return f"{key} has changed from {state['plan'].get(key)} to {value}"
        for name, fingerprint in after.items():
            if before[name] != fingerprint:
                return f"the samples of source {name!r}, or the pixel budgets, have changed"
        return None

    def _start(self) -> Iterator[Batch | DataError]:
        """All packs from here on. The first one is read by this process, before there are workers: with as many of them
        as cores it would have to share these with the first packs of all workers, and come last."""
        packs = self._packs()
        first = [self._read_here(pack) for pack in islice(packs, 1)]
        loader = DataLoader(
            self._fetcher,
            batch_size=None,
            sampler=_Packs(packs),
            num_workers=self._num_workers,
            multiprocessing_context="fork" if self._num_workers else None,
            prefetch_factor=self._prefetch if self._num_workers else None,
            collate_fn=shared if self._num_workers else None,
            pin_memory=self._pinned,
            # Its own generator: the default would draw a number from the training process's random state.
            generator=torch.Generator(),
            worker_init_fn=partial(begin_worker, os.getpid()),
        )
        # torch answers a worker's death with a RuntimeError wherever the training process happens to be. Undo that: the
        # next call of next_step() notices it as well (within five seconds) and can say what it means.
        on_death = signal.getsignal(signal.SIGCHLD)
        batches = iter(loader)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, on_death or signal.SIG_DFL)
        return chain(first, batches)

    def _read_here(self, pack: Pack) -> Batch:
        batch = self._fetcher[pack]
        return batch.pin_memory() if self._pinned else batch

    def _packs(self) -> Iterator[Pack]:
        for packs, position in self.plan.steps(self._position):
            self._positions_ahead.append(position)
            yield from packs[self._rank :: self._ranks]


class _Packs(Sampler):
    """Hands the packs to fetch to the DataLoader, which passes each to a worker as if it were an index."""

    def __init__(self, packs: Iterator[Pack]):
        self.packs = packs

    def __iter__(self) -> Iterator[Pack]:
        return self.packs
