"""What a run writes down: metrics.jsonl, TensorBoard, quarantine.jsonl, log.txt. On the main process alone."""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from training.step import StepReport

logger = logging.getLogger("glmv")


def metrics_line(step: int, report: StepReport, seconds: float) -> dict[str, Any]:
    """One line of metrics.jsonl."""
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
        **report.moe,
    }


class RunLog:
    """The records of one run folder. On a resume they are cut back to the checkpoint's step."""

    def __init__(self, folder: Path, resumed_at: int, steps: int) -> None:
        self.steps = steps
        folder.mkdir(parents=True, exist_ok=True)
        kept = keep_earlier(folder / "metrics.jsonl") if resumed_at == 0 else None
        for name in ("metrics.jsonl", "quarantine.jsonl"):
            cut_back(folder / name, resumed_at)
        self._metrics = (folder / "metrics.jsonl").open("a")
        self._quarantine = (folder / "quarantine.jsonl").open("a")
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_at + 1)
        console, file = logging.StreamHandler(sys.stdout), logging.FileHandler(folder / "log.txt")
        self._handlers: list[logging.Handler] = [console, file]
        for handler in self._handlers:
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
            logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        if kept is not None:
            logger.warning("no checkpoint here: the run begins again, its earlier metrics are kept in %s", kept.name)

    def step(self, step: int, report: StepReport, seconds: float, quarantined: list[dict[str, Any]]) -> None:
        line = metrics_line(step, report, seconds)
        print(json.dumps(line), file=self._metrics, flush=True)
        for key, value in line.items():
            if key != "step":
                self._tensorboard.add_scalar(key, value, step)
        for record in quarantined:
            print(json.dumps({"step": step, **record}), file=self._quarantine, flush=True)
        if quarantined:
            logger.warning("step %d: %d samples set aside, see quarantine.jsonl", step, len(quarantined))
        logger.info(
            "step %d/%d  loss %.4f  grad_norm %.3f  lr %.2e  %s tokens/s  padding %.1f%%",
            step, self.steps, report.loss, report.grad_norm, report.lr,
            f"{report.tokens / seconds:,.0f}", 100 * report.padding_fraction,
        )  # fmt: skip

    def close(self) -> None:
        self._metrics.close()
        self._quarantine.close()
        self._tensorboard.close()
        for handler in self._handlers:
            logger.removeHandler(handler)
            handler.close()


def keep_earlier(metrics: Path) -> Path | None:
    """Move the metrics of a run that left no checkpoint out of the way. Returns where they are, if there are any."""
    if not metrics.exists() or not metrics.stat().st_size:
        return None
    number = next(n for n in itertools.count(1) if not metrics.with_name(f"metrics.{n}.jsonl").exists())
    return metrics.rename(metrics.with_name(f"metrics.{number}.jsonl"))


def cut_back(path: Path, step: int) -> None:
    """Drop the lines after `step`, and a last line that a crash cut short."""
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
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)
