"""The records of a run: metrics.jsonl, TensorBoard, quarantine.jsonl, log.txt. Only the main process writes them."""

from __future__ import annotations

import itertools
import json
import logging
import math
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from common.files import write_text
from training.bad_steps import BadStep
from training.run_errors import RunFolderError
from training.step import StepReport
from training.trackers import Tracker

logger = logging.getLogger("glmv")
VALIDATION = "validation.jsonl"
TENSORBOARD_THREAD = "_AsyncWriterThread"  # the class of the thread that writes TensorBoard's file


@contextmanager
def writes_to(path: Path) -> Iterator[None]:
    """Turn what the file system refuses (a full disk, a quota) into a RunFolderError."""
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"{path} cannot be written ({error.strerror or error}): free some space or fix its file system, and start "
            "the run again; it resumes from its newest checkpoint"
        ) from error


def hide_tensorboard_traceback() -> None:
    """Print no stack trace for a file that TensorBoard's thread cannot write: the next call to it raises the error."""
    print_traceback = threading.excepthook

    def excepthook(failure: threading.ExceptHookArgs) -> None:
        if type(failure.thread).__name__ != TENSORBOARD_THREAD or not isinstance(failure.exc_value, OSError):
            print_traceback(failure)

    threading.excepthook = excepthook


def metrics_line(step: int, report: StepReport, seconds: float, measured: Mapping[str, float]) -> dict[str, Any]:
    """Return one line of metrics.jsonl."""
    return {
        "step": step,
        "loss": report.loss,
        "lr": report.lr,
        "grad_norm": report.grad_norm,
        "tokens": report.tokens,
        "padding_fraction": report.padding_fraction,
        "samples": report.samples,
        "images": report.images,
        "patches": report.patches,
        "step_seconds": seconds,
        "tokens_per_second": report.tokens / seconds,
        **{f"loss/{domain}": loss for domain, loss in report.domain_losses.items()},
        **{f"lr/{part}": lr for part, lr in report.scaled_lrs.items()},
        **{f"grad_norm/{part}": norm for part, norm in report.part_norms.items()},
        **report.moe,
        **report.metrics,
        **({"skipped": 1} if report.bad and not report.bad.updates else {}),
        **measured,
    }


def finite_or_null(value: Any) -> Any:
    """Return None, JSON's null, for a number that is not finite, and everything else as it is."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def finite_content(content: Any) -> Any:
    """Return JSON content with null in place of numbers that are not finite."""
    if isinstance(content, dict):
        return {name: finite_content(value) for name, value in content.items()}
    if isinstance(content, list):
        return [finite_content(value) for value in content]
    return finite_or_null(content)


def step_line(line: Mapping[str, Any], steps: int) -> str:
    """Return what is printed of a step: of a line of metrics.jsonl what a trainer watches."""
    shown = [
        f"step {line['step']}/{steps}",
        f"loss {line['loss']:.4f}",
        f"grad_norm {line['grad_norm']:.3f}",
        f"lr {line['lr']:.2e}",
        f"{line['tokens_per_second']:,.0f} tokens/s",
    ]
    if "mfu" in line:
        shown.append(f"MFU {line['mfu']:.1%}")
    if "memory_gb" in line:
        shown.append(f"memory {line['memory_gb']:.1f} GB")
    if "data_seconds" in line:
        shown.append(f"data {line['data_seconds']:.2f} s")
    shown.append(f"padding {line['padding_fraction']:.1%}")
    if "eta_seconds" in line:
        shown.append(f"ETA {duration(line['eta_seconds'])}")
    return "  ".join(shown)


def duration(seconds: float) -> str:
    """Return a time in its two largest units.

    >>> duration(42.4), duration(100), duration(7300), duration(200_000)
    ('42 s', '1 min 40 s', '2 h 1 min', '2 d 7 h')
    """
    units = {"d": 86400, "h": 3600, "min": 60, "s": 1}
    left, parts = round(seconds), list[str]()
    for name, size in units.items():
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count} {name}")
        if parts and (len(parts) == 2 or not count):
            break
    return " ".join(parts) or "0 s"


class LogFile(logging.FileHandler):
    """log.txt, which may be cut short where the disk is full: the console has the same lines, and the error."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Print no stack trace."""

    def close(self) -> None:
        """Close the file, also where what is left of it cannot be written."""
        with suppress(OSError):
            super().close()


class RunLog:
    """The records of one run folder. When a run resumes they are cut back to the checkpoint's step.

    Args:
        folder: the run folder; made if it does not exist.
        resumed_at: the checkpoint's step; 0 for a new run.
        steps: length of the run.

    Attributes:
        trackers: other places that get the lines of the steps.

    Raises:
        RunFolderError: from every method, if a file cannot be written.
    """

    def __init__(self, folder: Path, resumed_at: int, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self.trackers: list[Tracker] = []
        hide_tensorboard_traceback()
        with writes_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
            kept = keep_earlier(folder / "metrics.jsonl") if resumed_at == 0 else None
            if resumed_at == 0:
                keep_earlier(folder / VALIDATION)
            for name in ("metrics.jsonl", "quarantine.jsonl", VALIDATION):
                cut_back(folder / name, resumed_at)
            self._metrics = (folder / "metrics.jsonl").open("a")
            self._quarantine = (folder / "quarantine.jsonl").open("a")
            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_at + 1)
            console, file = logging.StreamHandler(sys.stdout), LogFile(folder / "log.txt")
        self._handlers: list[logging.Handler] = [console, file]
        for handler in self._handlers:
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
            logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        if kept is not None:
            logger.warning("there is no checkpoint: the run begins again; its earlier metrics are in %s", kept.name)

    def step(self, step: int, report: StepReport, seconds: float, measured: Mapping[str, float]) -> None:
        """Write what a step did, with what was measured of it (training.meter)."""
        line = metrics_line(step, report, seconds, measured)
        with writes_to(self.folder / "metrics.jsonl"):
            written = {key: finite_or_null(value) for key, value in line.items()}
            print(json.dumps(written, allow_nan=False), file=self._metrics, flush=True)
            for key, value in line.items():
                if key != "step":
                    self._tensorboard.add_scalar(key, value, step)
        for tracker in self.trackers:
            tracker.step(step, line)
        logger.info("%s", step_line(line, self.steps))

    def bad_step(self, step: int, bad: BadStep, samples: Path) -> None:
        """Say that a step was bad, and where its samples are listed."""
        what = "" if bad.updates else " was skipped"
        logger.warning("step %d%s: %s; its samples are listed in %s", step, what, bad.reason, samples)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers that are not part of every step's line into TensorBoard and the trackers."""
        for key, value in values.items():
            if key != "step":
                self._tensorboard.add_scalar(key, value, step)
        for tracker in self.trackers:
            tracker.step(step, dict(values))

    @property
    def tensorboard(self) -> SummaryWriter:
        """The writer, for what is neither a number nor written at every step."""
        return self._tensorboard

    def quarantined(self, step: int, records: Sequence[dict[str, Any]]) -> None:
        """Write down the quarantined samples of a step."""
        if not records:
            return
        with writes_to(self.folder / "quarantine.jsonl"):
            for record in records:
                print(json.dumps({"step": step, **record}), file=self._quarantine, flush=True)
        logger.warning("quarantined %d samples at step %d; see quarantine.jsonl", len(records), step)

    def close(self) -> None:
        """Close the files. After a write that failed nothing more is reported."""
        for file in (self._metrics, self._quarantine, self._tensorboard):
            try:
                file.close()
            except OSError as error:
                logger.warning("%s: %s", self.folder, error)
        for tracker in self.trackers:
            tracker.close()
        for handler in self._handlers:
            logger.removeHandler(handler)
            handler.close()


def keep_earlier(metrics: Path) -> Path | None:
    """Rename the metrics of a run that left no checkpoint, and return their new path; None where there are none."""
    if not metrics.exists() or not metrics.stat().st_size:
        return None
    names = (metrics.with_name(f"{metrics.stem}.{number}.jsonl") for number in itertools.count(1))
    return metrics.rename(next(name for name in names if not name.exists()))


def cut_back(path: Path, step: int) -> None:
    """Remove the lines after `step`, and a last line that a crash cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record["step"] <= step:
            kept.append(line + "\n")
    write_text(path, "".join(kept))
