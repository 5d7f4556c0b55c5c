"""Where a run starts: from its own newest checkpoint, from another model's weights, or from random weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from common.files import write_text
from common.storage import patiently
from common.urls import is_url, shown
from model.checkpoint import (
    HF_FILES,
    LATEST,
    STATE,
    STEP_FOLDER,
    find_checkpoint,
    is_checkpoint,
    latest_checkpoint,
    mark_latest,
    read_train_state,
)
from model.checkpoint_manifest import check_alone
from model.config import ConfigError, GlmvConfig
from model.errors import CheckpointError
from model.hf_config import CONFIG_FILE
from model.other_trainers import how_to_bring
from model.weights.formats.opened import open_folder
from model.weights.remote import local_hf_files, remote_of, title
from training.changed_keys import accept_moved_paths, changes, refuse_another_freeze, refuse_changes, with_defaults
from training.config import ModelChoice, RunConfig
from training.init_optimizer import check_init_optimizer
from training.keys import flatten
from training.lora_base import base_fingerprint, check_same_adapters, check_same_base, refuse_adapters
from training.ranks import rank

RUN_CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
FIRST_SAVE = ".first_save"  # names the step folder of a run's first save while `latest` does not exist yet


@dataclass(frozen=True)
class StartPoint:
    """The folder that a run starts from. Without one it starts from random weights."""

    resume: Path | None = None  # a checkpoint to resume, with its optimizer state and data counters
    weights: Path | None = None  # a checkpoint or Hugging Face folder to take weights from
    with_optimizer: bool = False  # whether to take the optimizer's moments from `weights`, too
    moved: tuple[str, ...] = ()  # lines about paths that have changed since the checkpoint
    changed: tuple[str, ...] = ()  # lines about all other keys that have
    base: str = ""  # fingerprint of `weights`, the frozen weights of a run with adapters (training.lora_base)
    damaged: tuple[tuple[Path, str], ...] = ()  # newer checkpoints, and what is wrong with them

    @property
    def folder(self) -> Path | None:
        """The checkpoint or Hugging Face folder; None for random weights."""
        return self.resume or self.weights

    @property
    def hf_files(self) -> Path | None:
        """The folder of its config.json and other Hugging Face files."""
        if self.folder is None:
            return None
        inside = self.folder / HF_FILES
        return inside if inside.is_dir() else self.folder

    def formats(self) -> Iterator[str]:
        """Yield a line about each format, other than the published one, that weights of a folder are read as."""
        if self.resume is None and self.weights is not None and not is_checkpoint(self.weights):
            if remote_of(self.weights):
                yield f"weights are read from {title(self.weights)}; its other files are copied to {self.weights}"
            yield from (f"weights read as: {line}" for line in open_folder(self.weights).read_as)


def find_start_point(config: RunConfig, damaged: Mapping[Path, str] | None = None) -> StartPoint:
    """Return where `config` starts, from the folders that it names.

    Args:
        config: the run.
        damaged: checkpoints not to resume from, and what is wrong with each.

    Raises:
        ConfigError: the output folder holds a run that cannot be resumed or cannot be written, or `model.init_from`
            is nothing to start from.
        CheckpointError: the newest checkpoint is missing, or all are damaged.
    """
    folder = Path(config.train.output_dir)
    _check_output_folder(folder)
    if config.checkpoint.resume == "never" and ((folder / RUN_CONFIG).exists() or (folder / CHECKPOINTS).exists()):
        raise ConfigError(
            f"train.output_dir={folder} holds a run and checkpoint.resume=never; choose another folder, or "
            "checkpoint.resume=auto to resume it"
        )
    newest = newest_checkpoint(folder)
    if newest is None:
        return _from_weights(config)
    checkpoint, damaged_newer = newest_usable(folder, newest, config.checkpoint.verify, damaged or {})
    before = read_train_state(checkpoint)
    if before.step > config.train.steps:
        raise ConfigError(
            f"train.steps={config.train.steps} is below step {before.step}, which the run at {folder} has reached; "
            "raise it, or choose another train.output_dir"
        )
    refuse_another_freeze(before.config, config.freeze, folder)
    check_same_adapters(before, config, folder)
    start_point = StartPoint(resume=checkpoint, damaged=damaged_newer)
    if config.lora.rank:
        start_point = replace(_from_weights(config), resume=checkpoint, damaged=damaged_newer)
        check_same_base(before, config, start_point.base, folder)
    old, new = with_defaults(before.config, config), dict(flatten(asdict(config)))
    for keys in (old, new):  # another signature is no other folder, and appears in no message
        keys["model.init_from"] = shown(keys["model.init_from"])
    if config.checkpoint.allow_changes:
        return replace(start_point, changed=tuple(changes(old, new)))
    moved = tuple(accept_moved_paths(old, new))
    refuse_changes(old, new, folder)
    return replace(start_point, moved=moved, changed=tuple(changes(old, new)))


# --- checkpoints of a run folder --------------------------------------------------------------------------------------


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint that the run at `folder` resumes from, or None where it has none.

    Raises:
        ConfigError: there are step folders but no `latest`, so a new run would overwrite them.
        CheckpointError: `latest` names a folder that does not exist.
    """
    if (checkpoint := latest_checkpoint(folder)) is not None:
        return checkpoint
    steps = step_folders(folder)
    if not steps:
        return None
    first_save = folder / CHECKPOINTS / FIRST_SAVE
    if first_save.is_file() and first_save.read_text() == steps[-1].name:
        return steps[-1]
    raise ConfigError(
        f"train.output_dir={folder}: {CHECKPOINTS}/ holds {steps[-1].name} but no {LATEST}: write its name there to "
        "resume from it, or choose another folder"
    )


def newest_usable(
    folder: Path, newest: Path, verify: str, known: Mapping[Path, str]
) -> tuple[Path, tuple[tuple[Path, str], ...]]:
    """Return the newest checkpoint up to `newest` that is not damaged, and the newer ones with what is wrong with them.

    Only what one process can see quickly is looked at: see `training.fallback` for the rest.

    Args:
        folder: the run folder.
        newest: the checkpoint that the run should resume from.
        verify: `checkpoint.verify`.
        known: checkpoints that are known to be damaged.

    Raises:
        CheckpointError: all are damaged.
        StorageError: one cannot be read because storage fails, which is not taken for damage.
    """
    damaged: list[tuple[Path, str]] = []
    for path in reversed([step for step in step_folders(folder) if step.name <= newest.name]):
        try:
            if path in known:
                raise CheckpointError(known[path])
            read_train_state(path)
            check_alone(path, verify, only_small=rank() != 0)
        except CheckpointError as error:
            damaged.append((path, str(error)))
        else:
            return path, tuple(damaged)
    raise CheckpointError(
        f"no checkpoint of the run at {folder} can be used: {'; '.join(reason for _, reason in damaged)}"
    )


def step_folders(folder: Path) -> list[Path]:
    """Return the step folders of a run, in order."""
    checkpoints = folder / CHECKPOINTS
    found = patiently(lambda: list(checkpoints.iterdir()) if checkpoints.is_dir() else [], checkpoints)
    return sorted(path for path in found if STEP_FOLDER.fullmatch(path.name))


def announce_first_save(path: Path) -> None:
    """Note that `path` is about to be saved, in a run without `latest`.

    A run that is killed after the step folder got its name and before `latest` did resumes from that folder.
    """
    if not (path.parent / LATEST).is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path.parent / FIRST_SAVE, path.name)


def make_latest(path: Path) -> None:
    """Make a saved step folder the one that the run resumes from."""
    mark_latest(path)
    (path.parent / FIRST_SAVE).unlink(missing_ok=True)


def _from_weights(config: RunConfig) -> StartPoint:
    weights = find_weights(config.model.init_from)
    if weights is not None and config.model.init_optimizer:
        check_init_optimizer(config, weights)
        return StartPoint(weights=weights, with_optimizer=True)
    return StartPoint(weights=weights, base=base_fingerprint(weights, config.train.seed) if config.lora.rank else "")


def find_weights(init_from: str) -> Path | None:
    """Return the checkpoint or Hugging Face folder that `model.init_from` means; None if it is empty.

    Of a folder behind a URL it is the local copy of its small files: see `model.weights.remote`.

    Raises:
        ConfigError: It is neither, or a checkpoint of adapters.
        WeightsError, StorageError: It is a URL that cannot be read.
        CheckpointError: It is a run's folder whose `latest` is damaged.
    """
    if not init_from:
        return None
    if is_url(init_from):
        return local_hf_files(init_from)
    path = Path(init_from)
    if is_checkpoint(path):
        refuse_adapters(found := find_checkpoint(path))
        return found
    if (path / CONFIG_FILE).is_file():
        return path
    if steps := step_folders(path):
        raise ConfigError(
            f"model.init_from={path} has no {CHECKPOINTS}/{LATEST}: give one of its step folders, such as {steps[-1]}"
        )
    if not path.exists():
        raise ConfigError(
            f"model.init_from={path}: there is no such folder; run the stage that writes it, or name another model"
        )
    raise ConfigError(
        f"model.init_from={path} is neither a checkpoint, nor a run's folder with one, nor a Hugging Face folder"
        f"{how_to_bring(path)}"
    )


def _check_output_folder(folder: Path) -> None:
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(f"train.output_dir={folder} cannot be written: {existing} is not a writable folder")
    if (folder / CONFIG_FILE).exists() or (folder / STATE).exists():
        raise ConfigError(f"train.output_dir={folder} is the folder of a model, not of a run; choose another")


# --- the model --------------------------------------------------------------------------------------------------------


def resolve_model(choice: ModelChoice, start_point: StartPoint) -> GlmvConfig:
    """Return the model on which the preset, if there is one, and the folder to start from, if there is one, agree.

    `model.max_position_embeddings` and `model.rope_theta` replace its values.

    Raises:
        ConfigError: the preset is unknown, the folder holds no GLM-V model, or the two differ.
    """
    preset = with_positions(GlmvConfig.from_preset(choice.preset), choice) if choice.preset else None
    if start_point.hf_files is None:
        assert preset is not None
        return preset
    found = with_positions(GlmvConfig.from_hf(start_point.hf_files), choice)
    if preset is not None and preset != found:
        where = title(start_point.folder) if start_point.folder else ""
        raise ConfigError(
            f"model.preset={choice.preset} is another model than the one in {where}; leave model.preset "
            "empty to take that one"
        )
    return found


def with_positions(model: GlmvConfig, choice: ModelChoice) -> GlmvConfig:
    """Return `model` with the length and rope base that `choice` sets on purpose."""
    changes = {key: getattr(choice, key) for key in ("max_position_embeddings", "rope_theta") if getattr(choice, key)}
    return replace(model, decoder=replace(model.decoder, **changes))


def agree_on_start_point(start_point: StartPoint) -> StartPoint:
    """Return the main process's start point, on every process. Collective.

    What a process finds by itself may differ: file systems show new files late, and a run that `model.init_from` names
    may save meanwhile.

    Raises:
        CheckpointError: on all processes, if one of them does not see the chosen folder.
    """
    choice = [start_point]
    dist.broadcast_object_list(choice, src=0)
    folders = [path for path in (choice[0].resume, choice[0].weights) if path is not None]
    missing = torch.tensor(float(not all(path.is_dir() for path in folders)), device=torch.cuda.current_device())
    dist.all_reduce(missing)
    if missing:
        raise CheckpointError(
            f"{' or '.join(map(str, folders))} is not seen by {int(missing)} of {dist.get_world_size()} processes: "
            "train.output_dir and model.init_from must be on a file system that all nodes share"
        )
    return choice[0]
