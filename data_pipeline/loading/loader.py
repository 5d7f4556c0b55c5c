"""`PackedLoader`: the packs of every step, in order, on this rank; stops and resumes exactly.

The plan runs here, in the training process, and costs little. Data workers receive the samples to fetch and answer in
order. Packs that were fetched ahead are not part of the state; they are fetched again after a resume.

Workers are forked and never use a GPU. If there is one, a thread of the training process pins the packs.
"""

from __future__ import annotations

import os
import signal
import threading
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
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
from data_pipeline.loading.workers import (
    WORKER_GONE,
    WorkerNotes,
    init_worker,
    to_private_memory,
    to_shared_memory,
)
from data_pipeline.media.pixel_budget import PixelBudget
from data_pipeline.plan.blend import StreamPosition
from data_pipeline.plan.mixture_report import DomainShare, SourceUse, planned_mixture, source_use
from data_pipeline.plan.pack_cost import PackCost
from data_pipeline.plan.plan import Pack, Piece, Plan, PlanPosition, smallest_steps
from data_pipeline.shards.lost import LostShards
from data_pipeline.shards.shard_cache import ShardCache

STATE_FORMAT = 3
# Keys of the plan that a state holds as a checksum, so that their old value cannot be shown.
_CHECKSUMS = ("data.tokenizer", "data.sources[].weight or epochs", "the cost of the model's parts")


class PackedLoader:
    """Steps of packs, the same for every data-parallel size and worker count. Endless unless every source has `epochs`.

    Rank r of n gets packs r, r + n, r + 2n ... of the global_batch_size packs of a step.

    Attributes:
        tokenizer: Of the run.
        sources: The sources of the mixture.
        plan: Which samples make up which pack.
        tally: What the run has read and quarantined so far, over all ranks. The caller adds to it.
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
        small_steps: int = 0,
    ) -> None:
        """Open the sources; no worker is started yet.

        Args:
            config: The data.* keys.
            seq_length: Tokens per pack.
            global_batch_size: Packs per step, over all ranks.
            cost: By which packs are balanced.
            data_parallel_rank: Of this process.
            data_parallel_size: Number of data-parallel ranks.
            small_steps: Make steps only as large as all samples need, up to global_batch_size, and give each rank a
                multiple of this many packs of a step; some are empty. 0: every step has global_batch_size packs. All
                sources need `epochs`.

        Raises:
            DataError: The data cannot be used. The message names the file or key and says how to fix it.
        """
        _check(config, global_batch_size, data_parallel_size)
        self.tokenizer = GlmTokenizer(config.tokenizer)
        budget = PixelBudget(config.image_max_tokens, config.video_max_tokens)
        cache = ShardCache(config.cache_dir, config.cache_bytes)
        self.sources = [
            Source(source, tokenizer_hash=self.tokenizer.hash, budget=budget, cache=cache) for source in config.located
        ]
        _check_learned(self.sources)
        sizes = {"seq_length": seq_length, "segment_multiple": config.segment_multiple}
        self._plan_of = partial(Plan, self.sources, seed=config.seed, cost=cost, too_long=config.too_long, **sizes)
        packs = smallest_steps(self._plan_of, global_batch_size) if small_steps else global_batch_size
        self.plan = self._plan_of(global_batch_size=packs)
        self._rank, self._ranks, multiple = data_parallel_rank, data_parallel_size, small_steps or 1
        self._packs_per_rank = -(-packs // (data_parallel_size * multiple)) * multiple
        locations = chain.from_iterable(source.locations() for source in self.sources)
        self._lost = LostShards(config.retry_seconds, locations, give_up=config.on_lost_shard == "quarantine")
        self._num_workers, self._prefetch = config.num_workers, config.prefetch
        self._pinned, self._notes = torch.accelerator.is_available(), WorkerNotes(config.num_workers)
        self._fetcher = PackFetcher(
            self.sources,
            self.tokenizer,
            budget,
            **sizes,
            truncate=config.too_long == "truncate",
            cache=cache,
            lost=self._lost,
            notes=self._notes,
        )
        self.tally, self._position = Tally(), PlanPosition.start(len(self.sources))
        self._before: PlanPosition | None = None  # the step that was read last
        self._positions_ahead: deque[PlanPosition] = deque()  # after each step whose packs were handed to the workers
        self._batches: Iterator[Batch | DataError] | None = None
        self._workers: Any = None  # torch's iterator over what they send

    # --- steps --------------------------------------------------------------------------------------------------------

    def next_step(self) -> list[Batch]:
        """Return this rank's packs of the next step, in order; none when all sources have used up their epochs.

        Raises:
            DataError: A worker died or has no shared memory. The message names the samples that it was reading.
            Interrupted: After `stop_waiting`, where a shard is lost.
        """
        self._before = None
        if self._batches is None:
            self._batches = self.read_packs()
        try:
            batches = [to_private_memory(batch) for batch in islice(self._batches, self._packs_per_rank)]
        except (DataError, RuntimeError, *WORKER_GONE) as error:
            died = isinstance(error, WORKER_GONE) or str(error).startswith("DataLoader worker (pid")
            samples = self._notes.samples_of_dead_workers() if died else []
            self.close()
            if not died:
                raise
            at = "".join(f" at {sample_id}" for sample_id in samples)
            raise DataError(
                f"a data worker died{at} ({error}): it may have run out of memory; set data.num_workers=0 to see its "
                "error"
            ) from error
        if batches:
            self._before, self._position = self._position, self._positions_ahead.popleft()
        return batches

    def unread(self) -> None:
        """Go back before the step that `next_step` returned last, which is not used."""
        self.close()
        if self._before is not None:
            self._position = self._before
            self._before = None

    def stop_waiting(self) -> None:
        """Wait for lost shards no longer, because the run ends: not now, and not later."""
        self._lost.stop_waiting()

    def read_packs(self) -> Iterator[Batch | DataError]:
        """Start the workers, and return an iterator over this rank's packs from the current step on.

        `next_step` calls this; it also keeps track of the position. This process reads the first pack itself, before
        the workers start: with as many workers as cores, that pack would compete with the first packs of all workers,
        and arrive last.
        """
        packs = self._planned_packs()
        first = [self._read_here(pack) for pack in islice(packs, 1)]
        loader = DataLoader(
            self._fetcher,
            batch_size=None,
            sampler=_Packs(packs),
            num_workers=self._num_workers,
            multiprocessing_context="fork" if self._num_workers else None,
            prefetch_factor=self._prefetch if self._num_workers else None,
            collate_fn=to_shared_memory if self._num_workers else None,
            pin_memory=self._pinned,
            # A generator of its own: the default would take a number from the training process's random state.
            generator=torch.Generator(),
            worker_init_fn=partial(init_worker, os.getpid()),
        )
        # torch answers a worker's death with a RuntimeError wherever the training process happens to be. Undo that: the
        # next call of next_step() notices the death as well (within five seconds) and can explain it.
        on_death = signal.getsignal(signal.SIGCHLD)
        batches = iter(loader)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, on_death or signal.SIG_DFL)
        if self._num_workers:
            self._workers = batches
        return chain(first, batches)

    def skip(self, steps: int) -> None:
        """Move `steps` steps ahead without reading them."""
        self.close()
        for _, position in islice(self.plan.steps(self._position), steps):
            self._position = position

    def rewind(self) -> None:
        """Go back to the first step."""
        self.close()
        self._position = PlanPosition.start(len(self.sources))

    def close(self) -> None:
        """Stop the workers. The loader can be used again; it continues at the next step."""
        if self._workers is not None:
            # torch stops them when nothing refers to its iterator; the stack trace of an error that is kept may.
            self._workers._shutdown_workers()
        self._batches = self._workers = None
        self._positions_ahead.clear()

    # --- reports, from metadata only ----------------------------------------------------------------------------------

    def planned_mixture(self) -> dict[str, DomainShare]:
        """Return what the next steps take from every domain: all steps of the window that contains the next one."""
        steps, _ = self.plan.window(self._position)
        return planned_mixture(self.sources, chain.from_iterable(steps))

    def source_use(self) -> list[SourceUse]:
        """Return how fast the first window of the run uses up each source, in the order of data.sources.

        The same on every rank and at every restart.
        """
        steps, _ = self.plan.window(PlanPosition.start(len(self.sources)))
        return source_use(self.sources, steps)

    def expected_work(self) -> tuple[list[int], list[int]]:
        """Return the tokens of every segment and the patches of every image and frame pair of the run's first packs.

        Covers MIN_WINDOW_PACKS packs. The same on every rank and at every restart.
        """
        segments = [segment for pack in self.expected_packs() for segment in pack]
        return [length for length, _ in segments], [n for _, patches in segments for n in patches]

    def expected_packs(self) -> list[list[tuple[int, list[int]]]]:
        """Return the run's first packs: the tokens of each segment, and the patches of its images and frame pairs.

        Covers MIN_WINDOW_PACKS packs. The images of a split sample are all with its first piece.
        """
        # A window has at least one step, which may be thousands of packs.
        first_packs = self._plan_of(global_batch_size=1)
        steps, _ = first_packs.window(PlanPosition.start(len(self.sources)))
        packs = [pack.pieces for step in steps for pack in step]
        return [[(piece.length, self._patches_begun(piece)) for piece in pieces] for pieces in packs]

    def _patches_begun(self, piece: Piece) -> list[int]:
        return self.sources[piece.source].image_patches(piece.row) if piece.start == 0 else []

    @property
    def source_fingerprints(self) -> dict[str, str]:
        """{label: fingerprint} in the order of data.sources; independent of their paths. See Source.fingerprint."""
        return {source.label: source.fingerprint for source in self.sources}

    @property
    def has_media(self) -> bool:
        """Whether any sample of any source has images or videos."""
        return any(source.has_media for source in self.sources)

    @property
    def chat_forms(self) -> dict[str, list[str]]:
        """{label: chat forms} of the sources that contain chats."""
        return {source.label: source.chat_forms for source in self.sources if source.chat_forms}

    # --- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next step: counters, and what they count.

        The state is less than 1 kB of JSON with eight sources.
        """
        return {
            "format": STATE_FORMAT,
            "position": self._position.state_dict(),
            "sources": self.source_fingerprints,
            "plan": self._plan_keys(),
            "tally": self.tally.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], *, allow_changes: bool = False) -> None:
        """Resume where `state` was taken.

        Sources are compared by label and fingerprint, not by path: a folder of shards may be moved.

        Args:
            state: From `state_dict`.
            allow_changes: Resume although the plan has changed. Sources continue at their own counters, by label, and a
                new window begins there. Up to a window of packs may come again, and a sample of which only some pieces
                were used begins again, as its pieces may be different now. Token counts start at 0, so the blend does
                not try to catch up after a changed weight, and so does the tally.

        Raises:
            DataError: The plan from here would not be the same, or another version wrote the state.
        """
        self.close()
        if state.get("format") != STATE_FORMAT:
            raise DataError(
                "the checkpoint's data state was written by another version of this program: finish the run with that "
                "version, or start a new run from its weights with model.init_from"
            )
        change = self._change(state)
        if change is None:
            self._position = PlanPosition.from_state_dict(state["position"])
            self.tally.load_state_dict(state["tally"])
        elif allow_changes:
            streams = PlanPosition.from_state_dict(state["position"]).streams
            before = dict(zip(state["sources"], streams, strict=True))
            self._position = PlanPosition(
                tuple(before.get(label, StreamPosition())._replace(pieces=0, tokens=0) for label in self._labels())
            )
        else:
            raise DataError(f"{change} since the checkpoint: undo it, or set checkpoint.allow_changes=true")

    def _labels(self) -> list[str]:
        return [source.label for source in self.sources]

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
        """Describe the first difference between this plan and that of `state`; None if there is none."""
        labels, now = list(state["sources"]), self._labels()
        if labels != now:
            return (
                f"the names of data.sources (without `name`, the last part of the path) have changed from "
                f"{', '.join(labels)} to {', '.join(now)}"
            )
        for key, value in self._plan_keys().items():
            before = state["plan"].get(key)
            if before != value:
                return f"{key} has changed" + ("" if key in _CHECKSUMS else f" from {before} to {value}")
        for label, fingerprint in self.source_fingerprints.items():
            if state["sources"][label] != fingerprint:
                return f"the samples of source {label!r}, or the pixel budgets, have changed"
        return None

    # --- reading ------------------------------------------------------------------------------------------------------

    def _read_here(self, pack: Pack) -> Batch | DataError:
        batch = self._fetcher[pack]
        return batch.pin_memory() if self._pinned and isinstance(batch, Batch) else batch

    def _planned_packs(self) -> Iterator[Pack]:
        for packs, position in self.plan.steps(self._position):
            self._positions_ahead.append(position)
            empty = [Pack(())] * (self._packs_per_rank * self._ranks - len(packs))
            yield from [*packs, *empty][self._rank :: self._ranks]


def _check_learned(sources: Sequence[Source]) -> None:
    for source in sources:
        if "rl" in source.domains:
            raise DataError(
                f"source {source.label!r} holds prompts (domain rl), of which no token carries loss: train on them "
                "with rl.train, and remove the source from this run"
            )


def _check(config: DataConfig, global_batch_size: int, data_parallel_size: int) -> None:
    config.check()
    if global_batch_size % data_parallel_size:
        raise DataError(
            f"train.global_batch_size {global_batch_size} is not a multiple of the data-parallel size "
            f"{data_parallel_size}: change one of them"
        )


class _Packs(Sampler):
    """Hands the packs to fetch to the DataLoader, which passes each to a worker as if it were an index."""

    def __init__(self, packs: Iterator[Pack]) -> None:
        self.packs = packs

    def __iter__(self) -> Iterator[Pack]:
        return self.packs
