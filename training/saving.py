"""When a run saves, whether training waits for it, and which checkpoints are kept.

With `checkpoint.async_save` a save has two parts. The main thread copies this process's state into main memory, which
is all that training waits for. Then a thread assembles the optimizer's state, writes, checks and renames the step
folder, makes it the latest and removes old ones: the same code, and the same bytes, as a save that training waits for.
The threads of all processes communicate over a gloo group of their own. megatron-core's queue of asynchronous saves is
not used: it forks processes that train, and it leaves checksums and the rename, which are collective, to training.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model.agreement import on_main_process
from model.checkpoint import TrainState, remove_old, write_checkpoint
from model.checkpoint_state import StateCopy, sharded_state
from model.errors import CheckpointError
from training.config import RunConfig
from training.metrics import logger, writes_to
from training.run_errors import RunFolderError
from training.start_point import CHECKPOINTS, announce_first_save, make_latest
from training.step import TrainStep

# Of a collective in the background, in which processes wait for the slowest writer. A process that dies ends it at
# once, whatever this says.
TIMEOUT = timedelta(hours=12)


class Saver:
    """Saves a run's checkpoints. All methods are collective.

    Args:
        config: of the run.
        trainer: what is saved.
        train_state: gives the state of the run after a step, the last one that was taken.
        hf_files: fills a checkpoint's folder of Hugging Face files.
        saved: step of the checkpoint that the run resumed from; 0: none.
    """

    def __init__(
        self,
        config: RunConfig,
        trainer: TrainStep,
        train_state: Callable[[int], TrainState],
        hf_files: Callable[[Path], None],
        saved: int,
    ) -> None:
        self.config, self.trainer, self.train_state, self.hf_files = config, trainer, train_state, hf_files
        self.folder = Path(config.train.output_dir) / CHECKPOINTS
        self.saved = saved  # newest step that was saved, or is being saved
        self._copy = StateCopy()
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT) if config.checkpoint.async_save else None
        self._writing: _Writing | None = None

    @property
    def is_writing(self) -> bool:
        """Whether there is a save in the background, of which not all processes are known to be done."""
        return self._writing is not None

    @property
    def is_busy(self) -> bool:
        """Whether this process itself is writing in the background."""
        return self._writing is not None and self._writing.is_alive()

    def after_step(self, step: int) -> None:
        """Save if a checkpoint of this step is due, and look at the save in the background, if there is one.

        Raises:
            CheckpointError: a checkpoint could not be written.
        """
        self.poll()
        if self.is_due(step):
            self.save(step)

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint is saved after this step."""
        interval = self.config.checkpoint.save_interval
        return bool(interval) and step % interval == 0

    def save_last(self, step: int) -> None:
        """Save the step that a run ends at, unless nothing is to be saved, and wait until it is saved.

        Raises:
            CheckpointError: a checkpoint could not be written.
        """
        if self.config.checkpoint.save_interval and step > self.saved:
            self.save(step)
        self.wait()

    def save(self, step: int) -> None:
        """Write a checkpoint and make it the latest; with `checkpoint.async_save` begin to.

        Raises:
            CheckpointError: this checkpoint could not be written, or the one before, which was still being written.
        """
        self._wait_for_the_one_before(step)
        path = self.folder / f"step_{step:07d}"
        train_state = copy.deepcopy(self.train_state(step))
        self.trainer.synchronize_weights()
        chunks, optimizer = self.trainer.model_chunks, self.trainer.optimizer
        if self._group is None:
            self._write(path, train_state, lambda: sharded_state(chunks, optimizer))
        else:
            state = self._copy.take(chunks, optimizer)
            self._writing = _Writing(step, lambda: self._write(path, train_state, state))
        self.saved = step

    def poll(self) -> None:
        """End the save in the background if all processes are done with it. Costs nothing if there is none.

        Raises:
            CheckpointError: it failed.
        """
        if self._writing is None:
            return
        own = [self._writing.is_alive(), self._writing.error is not None]
        found = torch.tensor(own, dtype=torch.int, device=torch.cuda.current_device())
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        is_alive, has_failed = found.tolist()
        if has_failed or not is_alive:
            self._end(failed=bool(has_failed))

    def wait(self) -> None:
        """Wait until the save in the background is done, if there is one.

        Raises:
            CheckpointError: it failed.
        """
        if self._writing is not None:
            self._writing.join()
            self._end()

    def close(self) -> None:
        """Let the save in the background end where the run ends with an error. Its own error is only logged then."""
        step = self._writing.step if self._writing is not None else 0
        try:
            self.wait()
        except CheckpointError as error:
            logger.warning("%s", error)
        except Exception:  # with another process lost, which the run reports
            logger.warning("the save of step %d in the background was not finished", step)

    def _wait_for_the_one_before(self, step: int) -> None:
        if self._writing is not None:
            before, began = self._writing.step, time.perf_counter()
            self.wait()
            if dist.get_rank() == 0:
                logger.info(
                    "the save of step %d waited %.1f s for that of step %d; if this is often, raise "
                    "checkpoint.save_interval",
                    step,
                    time.perf_counter() - began,
                    before,
                )

    def _end(self, *, failed: bool = False) -> None:
        """Forget the save in the background, which is done on this process, or has failed on any."""
        writing, self._writing = self._writing, None
        assert writing is not None
        if writing.error is not None:
            raise writing.error
        if failed:
            raise CheckpointError(f"the save of step {writing.step} failed on another process")

    def _write(self, path: Path, train_state: TrainState, state: Callable[[], dict[str, Any]]) -> None:
        """Write a checkpoint, make it the latest, remove old ones."""
        began, keep = time.perf_counter(), self.config.checkpoint
        self._on_main_process(lambda: announce_first_save(path))
        write_checkpoint(path, state, hf_files=self.hf_files, train_state=train_state, group=self._group)

        def make_it_the_latest() -> None:
            make_latest(path)
            remove_old(path, keep.keep_last, keep.keep_every)
            logger.info("saved %s in %.1f s", path, time.perf_counter() - began)

        self._on_main_process(make_it_the_latest)

    def _on_main_process(self, action: Callable[[], None]) -> None:
        """Change files in the folder of checkpoints, on the main process."""

        def act() -> None:
            try:
                with writes_to(self.folder):
                    action()
            except RunFolderError as error:
                raise CheckpointError(str(error)) from None

        on_main_process(act, self._group)


class _Writing(threading.Thread):
    """The save of a step in the background, on one process."""

    def __init__(self, step: int, work: Callable[[], None]) -> None:
        super().__init__(name=f"save of step {step}", daemon=True)
        self.step = step
        self.error: BaseException | None = None
        self._work = work
        self._device = torch.cuda.current_device()
        self.start()

    def run(self) -> None:
        """Write; keep the error for the main thread."""
        try:
            torch.cuda.set_device(self._device)  # a new thread has the first GPU of the machine
            self._work()
        except BaseException as error:
            self.error = error
