"""Weights & Biases and MLflow: the lines of metrics.jsonl and validation.jsonl, sent from threads of their own.

Training never waits for a network: a tracker connects, sends and ends in its thread. What it cannot do is said once,
and the run continues without it. Both hold the same values as metrics.jsonl, under the same names.

A resumed run continues the same run of the tracker, whose name is in `trackers.json` of the run folder. It first sends
what the tracker lacks of the steps before: a process that was killed may have recorded more than it had sent. Steps
that the tracker has are not sent again: after a crash the run repeats them, with the same values.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import math
import netrc
import os
import queue
import threading
import time
import uuid
from collections.abc import Iterator
from heapq import merge
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from common.files import write_json
from model.config import ConfigError
from training.keys import flatten

logger = logging.getLogger("glmv")
IDS = "trackers.json"
WANDB_MARK = "wandb_has_step"  # key of that file
WANDB_SERVER = "https://api.wandb.ai"
INIT_TIMEOUT = 60  # seconds for W&B to connect; then it records offline
END_TIMEOUT = 60.0  # seconds that the end of a run waits for what is still to be sent
REQUEST_TIMEOUT, REQUEST_RETRIES = 10, 2  # of MLflow's requests
RECORDS = ("metrics.jsonl", "validation.jsonl")  # whose lines are sent
KINDS = ("loss", "validation/loss")  # a key that every line of these files has
MARK_SECONDS = 30.0  # what was handed over to W&B so long ago is on its disk


def check_trackers(wandb: str, mlflow: str, experiment: str) -> None:
    """Check the keys `metrics.wandb`, `metrics.mlflow` and `metrics.mlflow_experiment`.

    Raises:
        ConfigError: a package that they need is missing, or MLflow is given a folder.
    """
    if mlflow and urlsplit(mlflow).scheme in ("", "file"):
        raise ConfigError(
            f"metrics.mlflow={mlflow} is a folder, where MLflow cannot hold both loss and loss/DOMAIN: give "
            "a database, sqlite:////FOLDER/mlflow.db, or a server, http://HOST:PORT"
        )
    for key, value, package in (("wandb", wandb, "wandb"), ("mlflow", mlflow, "mlflow")):
        if value and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"metrics.{key}={value} needs the package {package}: pip install -c constraints.txt -e '.[{package}]', "
                f"or leave metrics.{key} empty"
            )
    if mlflow and not experiment:
        raise ConfigError("metrics.mlflow_experiment is empty: name the experiment of MLflow")


def open_trackers(config: Any, folder: Path, resumed_at: int, keys: dict[str, Any]) -> list[Tracker]:
    """Start the trackers that `config` (MetricsConfig) names.

    Args:
        config: the section `metrics`.
        folder: the run folder.
        resumed_at: step of the checkpoint from which the run resumes, 0 for a new run.
        keys: the run's whole configuration, which the trackers show.
    """
    made: list[Tracker] = []
    if config.wandb:
        made.append(WandbTracker(config.wandb, folder, resumed_at, keys))
    if config.mlflow:
        made.append(MlflowTracker(config.mlflow, config.mlflow_experiment, folder, resumed_at, keys))
    return made


class Tracker(threading.Thread):
    """A thread that sends the lines of steps. Subclasses connect, send and end.

    Args:
        folder: the run folder.
        resumed_at: as above.
        keys: as above.
    """

    name_of_service = ""

    def __init__(self, folder: Path, resumed_at: int, keys: dict[str, Any]) -> None:
        super().__init__(daemon=True, name=self.name_of_service)
        self.folder, self.resumed_at, self.keys = folder, resumed_at, keys
        known = _read_ids(folder) if resumed_at else {}
        self.run_id: str = known.get(self.name_of_service, "")
        self.held: dict[str, int] = {}
        self._lines: queue.SimpleQueue[tuple[int, dict[str, Any]] | None] = queue.SimpleQueue()
        self.start()

    def connect(self) -> None:
        """Begin a run of the service, or continue `run_id`; set `run_id`, and `held` to the last step of each kind."""
        raise AssertionError("a tracker connects")

    def send(self, step: int, line: dict[str, float]) -> None:
        """Send the numbers of one step."""
        raise AssertionError("a tracker sends")

    def end(self) -> None:
        """Send what is left, and end the run of the service."""
        raise AssertionError("a tracker ends")

    def step(self, step: int, line: dict[str, Any]) -> None:
        """Send the line of a step, later."""
        self._lines.put((step, line))

    def run(self) -> None:
        """Work until `close`: the body of the thread."""
        try:
            self.connect()
            _write_ids(self.folder, {self.name_of_service: self.run_id})
            for step, line in earlier_lines(self.folder, self.resumed_at):
                self._send_once(step, line)
            while (item := self._lines.get()) is not None:
                self._send_once(*item)
            self.end()
        except Exception as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            logger.warning("%s gets no more metrics, metrics.jsonl does: %s", self.name_of_service, said[0])

    def _send_once(self, step: int, line: dict[str, Any]) -> None:
        """Send what the service lacks."""
        if not any(step <= self.held.get(kind, 0) for kind in KINDS if kind in line):
            self.send(step, {key: value for key, value in line.items() if key != "step" and value is not None})

    def close(self) -> None:
        """End the run of the service; wait for it as long as END_TIMEOUT."""
        self._lines.put(None)
        self.join(END_TIMEOUT)
        if self.is_alive():
            logger.warning("%s did not get its last metrics within %.0f s", self.name_of_service, END_TIMEOUT)


def earlier_lines(folder: Path, until: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the lines that a run folder has up to a step, by step; those of a step's training before its validation."""

    def lines_of(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        if until and file.exists():
            with file.open() as lines:
                for text in lines:
                    if not text.endswith("\n") or (line := json.loads(text))["step"] > until:
                        return  # what the run writes meanwhile
                    yield line["step"], line

    yield from merge(*(lines_of(folder / name) for name in RECORDS), key=lambda item: item[0])


def _read_ids(folder: Path) -> dict[str, Any]:
    file = folder / IDS
    return json.loads(file.read_text()) if file.exists() else {}


_ids_lock = threading.Lock()


def _write_ids(folder: Path, ids: dict[str, Any]) -> None:
    with _ids_lock:
        write_json(folder / IDS, {**_read_ids(folder), **ids})


class WandbTracker(Tracker):
    """Weights & Biases; offline without a key, or where it cannot be reached."""

    name_of_service = "wandb"

    def __init__(self, project: str, folder: Path, resumed_at: int, keys: dict[str, Any]) -> None:
        self.project = project
        super().__init__(folder, resumed_at, keys)

    def connect(self) -> None:
        """Begin or continue the run."""
        wandb: Any = importlib.import_module("wandb")
        self.run_id = self.run_id or uuid.uuid4().hex[:8]
        mode = os.environ.get("WANDB_MODE") or None
        if mode is None and not _has_wandb_key():
            mode = "offline"
            logger.warning(
                "metrics.wandb: there is no API key (WANDB_API_KEY, or wandb login), so the run is recorded in %s; "
                "send it with wandb sync",
                self.folder / "wandb",
            )
        try:
            self._begin(wandb, mode)
        except Exception as error:
            if mode is not None:
                raise
            logger.warning("metrics.wandb: %s; the run is recorded offline", str(error).splitlines()[0])
            self._begin(wandb, "offline")
        # A server says what it has. What is recorded offline is known by the marks of this run's earlier processes.
        held = _read_ids(self.folder).get(WANDB_MARK, 0) if self._run.offline else self._run.starting_step - 1
        self.held = dict.fromkeys(KINDS, held if self.resumed_at else 0)
        self._marked_at, self._handed_over = time.monotonic(), self.held["loss"]

    def _begin(self, wandb: Any, mode: str | None) -> None:
        settings = wandb.Settings(init_timeout=INIT_TIMEOUT, console="off", silent=True)
        self._run = wandb.init(
            project=self.project,
            id=self.run_id,
            name=self.folder.name,
            dir=str(self.folder),
            config=self.keys,
            mode=mode,
            resume="allow",
            settings=settings,
        )

    def send(self, step: int, line: dict[str, float]) -> None:
        """Send the numbers of one step; the service ignores steps that it has."""
        self._run.log(line, step=step)
        if time.monotonic() > self._marked_at + MARK_SECONDS:
            _write_ids(self.folder, {WANDB_MARK: self._handed_over})
            self._marked_at, self._handed_over = time.monotonic(), step - 1

    def end(self) -> None:
        """Send what is left."""
        self._run.finish()


def _has_wandb_key() -> bool:
    """Whether the environment or the file that `wandb login` writes has a key."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", WANDB_SERVER)).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class MlflowTracker(Tracker):
    """MLflow, by its tracking URI: a server, a folder or a database."""

    name_of_service = "mlflow"

    def __init__(self, uri: str, experiment: str, folder: Path, resumed_at: int, keys: dict[str, Any]) -> None:
        self.uri, self.experiment = uri, experiment
        super().__init__(folder, resumed_at, keys)

    def connect(self) -> None:
        """Begin or continue the run."""
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(REQUEST_TIMEOUT))
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", str(REQUEST_RETRIES))
        tracking: Any = importlib.import_module("mlflow.tracking")
        self._entities: Any = importlib.import_module("mlflow.entities")
        self._client = tracking.MlflowClient(tracking_uri=self.uri)
        if self.run_id:
            for kind in KINDS:
                history = self._client.get_metric_history(self.run_id, kind)
                self.held[kind] = max((metric.step for metric in history), default=0)
            self._client.update_run(self.run_id, status="RUNNING")
            return
        known = self._client.get_experiment_by_name(self.experiment)
        experiment = known.experiment_id if known else self._client.create_experiment(self.experiment)
        self.run_id = self._client.create_run(experiment, run_name=self.folder.name).info.run_id
        values = [self._entities.Param(key, str(value)[:6000]) for key, value in flatten(self.keys)]
        for begin in range(0, len(values), 100):  # the most of one request
            self._client.log_batch(self.run_id, params=values[begin : begin + 100])

    def send(self, step: int, line: dict[str, float]) -> None:
        """Send the numbers of one step."""
        now = int(time.time() * 1000)
        finite = {key: value for key, value in line.items() if math.isfinite(value)}
        metrics = [self._entities.Metric(key, value, now, step) for key, value in finite.items()]
        self._client.log_batch(self.run_id, metrics=metrics)

    def end(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self.run_id)
