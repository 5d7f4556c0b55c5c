"""`PackedLoader`: the packs of every step, in order, on this rank; stops and goes on exactly.

The plan runs here, in the training process, and costs little; data workers are told which samples to fetch and answer
in order. What has been fetched ahead is not part of the state: it is fetched again after a resume.
"""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from data_pipeline.batch import Batch
from data_pipeline.config import DataConfig
from data_pipeline.encode import PixelBudget
from data_pipeline.errors import DataError
from data_pipeline.fetch import Failure, PackFetcher, PackOrder, order
from data_pipeline.index import Source
from data_pipeline.plan import Plan, Position
from data_pipeline.remote import ShardCache
from data_pipeline.tokens import GlmTokenizer


class PackedLoader:
    """Endless steps of packs; the packs of a step are the same whatever the data-parallel size and worker count.

    Rank r of n gets packs r, r+n, r+2n ... of the step's global_batch_size. Raises DataError if the data cannot be
    used, naming the file or key and the mend.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seq_length: int,
        global_batch_size: int,
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
        )
        self._rank, self._ranks = data_parallel_rank, data_parallel_size
        self._packs_per_rank = global_batch_size // data_parallel_size
        self._num_workers = config.num_workers
        self._fetcher = PackFetcher(
            self.tokenizer, budget, seq_length=seq_length, segment_multiple=config.segment_multiple, cache=cache
        )
        self._position = Position.start(len(self.sources))
        self._positions_ahead: deque[Position] = deque()  # after each step whose packs the workers have been told of
        self._batches: Iterator[Batch | Failure] | None = None

    def next_step(self) -> list[Batch]:
        """This rank's packs of the next step, in order."""
        if self._batches is None:
            self._batches = self._start()
        try:
            step = [next(self._batches) for _ in range(self._packs_per_rank)]
        except RuntimeError as error:
            self.close()
            if not str(error).startswith("DataLoader worker (pid"):
                raise
            raise DataError(
                f"a data worker died ({error}): look for a lack of memory, or set data.num_workers=0 to see it happen"
            ) from error
        batches = []
        for batch in step:
            if isinstance(batch, Failure):
                self.close()
                raise DataError(batch.message)
            batches.append(batch)
        self._position = self._positions_ahead.popleft()
        return batches

    def expected_work(self) -> tuple[list[int], list[int]]:
        """What the run's packs are like: tokens of every sample, and patches of every picture and frame pair, of the
        first MIN_WINDOW_PACKS packs. From metadata alone; the same on every rank and at every restart."""
        few = Plan(
            self.sources,
            seed=self.plan.seed,
            seq_length=self.plan.seq_length,
            segment_multiple=self.plan.segment_multiple,
            global_batch_size=1,  # a window is as wide as several steps, which may be thousands of packs
        )
        packs, _ = few.window(Position.start(len(self.sources)))
        pieces = [piece for pack in packs for piece in pack.pieces]
        patches = [n for piece in pieces for n in self.sources[piece.source].image_patches(piece.row)]
        return [piece.length for piece in pieces], patches

    def state_dict(self) -> dict[str, Any]:
        """The position of the next step: counters, and what they count."""
        sources = [{"name": source.label, "fingerprint": source.fingerprint} for source in self.sources]
        return {"position": asdict(self._position), "sources": sources, "plan": self._plan_keys()}

    def load_state_dict(self, state: dict[str, Any], *, allow_changes: bool = False) -> None:
        """Goes on where `state` was taken. Raises DataError if the plan would not be the same from there.

        With allow_changes, sources go on at their own counters, by name, and a new window begins there: up to a
        window's packs may come again. Token counts start afresh, so that a changed weight does not try to catch up.
        """
        self.close()
        change = self._change(state)
        if change is None:
            position = state["position"]
            self._position = Position(tuple(position["drawn"]), tuple(position["tokens"]), position["packs"])
        elif allow_changes:
            names = [source["name"] for source in state["sources"]]
            drawn = dict(zip(names, state["position"]["drawn"], strict=True))
            counters = tuple(drawn.get(source.label, 0) for source in self.sources)
            self._position = Position(counters, (0,) * len(self.sources))
        else:
            raise DataError(f"{change} since the checkpoint: undo it, or set checkpoint.allow_changes=true")

    def close(self) -> None:
        """Stops the workers. The loader can be used again; it goes on at the next step."""
        self._batches = None
        self._positions_ahead.clear()

    def _plan_keys(self) -> dict[str, Any]:
        return {
            "data.seed": self.plan.seed,
            "train.seq_length": self.plan.seq_length,
            "train.global_batch_size": self.plan.global_batch_size,
            "data.segment_multiple": self.plan.segment_multiple,
            "data.tokenizer": self.tokenizer.hash,
            "data.sources[].weight": [source.weight for source in self.sources],
        }

    def _change(self, state: dict[str, Any]) -> str | None:
        now = self.state_dict()
        for key, value in now["plan"].items():
            if state["plan"].get(key) != value:
                return f"{key} has changed from {state['plan'].get(key)} to {value}"
        before = {source["name"]: source["fingerprint"] for source in state["sources"]}
        after = {source["name"]: source["fingerprint"] for source in now["sources"]}
        if list(before) != list(after):
            return f"data.sources has changed from {', '.join(before)} to {', '.join(after)}"
        for name, fingerprint in after.items():
            if before[name] != fingerprint:
                return f"the samples of source {name!r}, or the pixel budgets, have changed"
        return None

    def _start(self) -> Iterator[Batch | Failure]:
        loader = DataLoader(
            self._fetcher,
            batch_size=None,
            sampler=_PackOrders(self),
            num_workers=self._num_workers,
            # Its own generator: the default would draw a number from the training process's random state.
            generator=torch.Generator(),
        )
        # torch answers a worker's death with a RuntimeError wherever the training process happens to be. Undo that: the
        # next call of next_step() notices it as well (within five seconds) and can say what it means.
        on_death = signal.getsignal(signal.SIGCHLD)
        batches = iter(loader)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, on_death or signal.SIG_DFL)
        return batches

    def _orders(self) -> Iterator[PackOrder]:
        for packs, position in self.plan.steps(self._position):
            self._positions_ahead.append(position)
            for pack in packs[self._rank :: self._ranks]:
                yield order(pack, self.sources, self.plan.seq_length)


class _PackOrders(Sampler):
    """Hands what to fetch to the DataLoader, which passes it to a worker as if it were an index."""

    def __init__(self, loader: PackedLoader):
        self.loader = loader

    def __iter__(self) -> Iterator[PackOrder]:
        return self.loader._orders()
