"""Fall back from a damaged newest checkpoint to the one before it, on all processes together.

    checkpoints/step_0000200.damaged/    what `latest` named: kept to be looked at, and not read again
    checkpoints/step_0000100/            where the run resumes; `latest` names it now

What one process can check quickly is checked before the processes join (`training.start_point.newest_usable`); the
checksums of the tensors are compared after that, each process a share of them.
"""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

from model.agreement import on_main_process
from model.checkpoint import STATE, mark_latest
from model.checkpoint_manifest import check_manifest
from model.checkpoint_metadata import check_metadata
from model.config import ConfigError, GlmvConfig
from model.errors import CheckpointError
from training.config import RunConfig
from training.metrics import logger
from training.start_point import StartPoint, agree_on_start_point, find_start_point, resolve_model

DAMAGED = ".damaged"


def settle_start_point(start_point: StartPoint, config: RunConfig, model: GlmvConfig) -> StartPoint:
    """Return where all processes start: where the main process would, or earlier if that is damaged. Collective.

    Args:
        start_point: what this process has found.
        config: the run.
        model: what it trains.

    Raises:
        CheckpointError: all checkpoints of the run are damaged, or the processes do not all see the chosen one.
        StorageError: one cannot be read because storage fails, which is not taken for damage.
    """
    start_point = agree_on_start_point(start_point)
    while (path := start_point.resume) is not None:
        try:
            on_main_process(partial(check_metadata, path / STATE))
            check_manifest(path, config.checkpoint.verify)
            return start_point
        except CheckpointError as error:
            damaged = {**dict(start_point.damaged), path: str(error)}
        found = [start_point]
        on_main_process(partial(_find_earlier, found, config, model, damaged))
        start_point = agree_on_start_point(found[-1])
    return start_point


def _find_earlier(found: list[StartPoint], config: RunConfig, model: GlmvConfig, damaged: dict[Path, str]) -> None:
    """Append where the run starts without the damaged checkpoints."""
    try:
        start_point = find_start_point(config, damaged)
        if resolve_model(config.model, start_point) != model:
            raise ConfigError(f"{start_point.folder}, the one before the damaged checkpoint, is of another model")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    found.append(start_point)


def keep_damaged(start_point: StartPoint) -> None:
    """Make the checkpoint that is used the latest, rename the damaged ones, and say so. On the main process.

    In this order: killed between the two, the run resumes from the same checkpoint.
    """
    if start_point.damaged and start_point.resume is not None:
        mark_latest(start_point.resume)
    for path, reason in start_point.damaged:
        names = (f"{path.name}{DAMAGED}{number or ''}" for number in itertools.count())
        kept = next(path.with_name(name) for name in names if not path.with_name(name).exists())
        try:
            path.rename(kept)
        except OSError as error:
            kept = Path(f"{path}, which cannot be renamed ({error.strerror})")
        logger.warning(
            "the checkpoint %s is damaged: the run falls back to %s. The cause: %s. It is kept as %s",
            *(path.name, start_point.resume and start_point.resume.name, reason, kept),
        )
