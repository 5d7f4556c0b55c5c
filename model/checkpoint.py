"""Save and load checkpoints: folders that load at any layout and are committed atomically.

    step_0000100/
        state/              weights, and in a training run the optimizer's state: megatron-core's torch_dist format
        train_state.json    step, data counters, the run's configuration (absent where weights were imported)
        hf/                 config.json, tokenizer, chat template, preprocessor: what an export needs beside the weights
        manifest.json       size and checksums of all these files

Only tensors are written and read; `model.checkpoint_metadata` says what is checked before anything is unpickled.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from common.disk import free_space
from common.files import sync_folder, write_json, write_text
from common.storage import patiently
from model.agreement import on_main_process, raise_everywhere
from model.checkpoint_manifest import check_manifest, write_manifest
from model.checkpoint_metadata import check_metadata
from model.checkpoint_state import sharded_state
from model.checkpoint_writer import write_tensors
from model.errors import CheckpointError
from model.finite import nonfinite
from model.fp8_weights import keep_first_values, round_from_main_weights
from model.hf_config import CONFIG_FILE, add_old_rope_spelling
from model.megatron_versions import with_groups_of
from model.other_trainers import how_to_bring
from model.weights.load import local_tensors

__all__ = [
    "HF_FILES",
    "STATE",
    "TRAIN_STATE",
    "CheckpointError",
    "TrainState",
    "find_checkpoint",
    "is_checkpoint",
    "latest_checkpoint",
    "load_checkpoint",
    "mark_latest",
    "read_train_state",
    "remove_old",
    "remove_unfinished",
    "save_checkpoint",
    "write_checkpoint",
]

STEP_FOLDER = re.compile(r"step_\d+")
STATE, TRAIN_STATE, HF_FILES, LATEST = "state", "train_state.json", "hf", "latest"
UNFINISHED = ".unfinished_"  # in front of a step folder's name until it is complete


@dataclass
class TrainState:
    """Everything that must survive a crash besides tensors.

    There is no random state: the data and the masks of dropout are functions of the seed and of these counters. The
    learning rate is a function of the step.
    """

    step: int  # steps done
    data: dict[str, Any] = field(default_factory=dict)  # counters of the loader
    config: dict[str, Any] = field(default_factory=dict)  # configuration of the run
    updates: int | None = None  # Adam's step count: updates behind its moments; None in older checkpoints: as steps
    bad_steps: dict[str, Any] = field(default_factory=dict)  # state of the detector of bad steps
    metrics: dict[str, Any] = field(default_factory=dict)  # what metrics count over the whole run
    base: str = ""  # fingerprint of the frozen weights, where the checkpoint holds only adapters (LoRA)
    fp8: dict[str, Any] = field(default_factory=dict)  # what the scales of fp8.recipe=delayed follow from, emulated

    @property
    def updates_done(self) -> int:
        """Adam's step count."""
        return self.step if self.updates is None else self.updates


# --- finding ----------------------------------------------------------------------------------------------------------


def latest_checkpoint(run_folder: str | Path) -> Path | None:
    """Return the newest committed checkpoint of a run, or None.

    Raises:
        CheckpointError: the `latest` file names a step folder that does not exist.
    """
    checkpoints = Path(run_folder) / "checkpoints"
    marker = checkpoints / LATEST
    if not patiently(marker.is_file, marker):
        return None
    name = patiently(marker.read_text, marker).strip()
    folder = checkpoints / name
    if not STEP_FOLDER.fullmatch(name) or not patiently(folder.is_dir, folder):
        raise CheckpointError(
            f"{marker} names {name!r}, which does not exist; write the name of an existing step folder into it"
        )
    return folder


def find_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint meant by `path`: the step folder itself, or the newest one of a run's folder.

    Raises:
        CheckpointError: `path` is neither.
    """
    path = Path(path)
    if (path / STATE).is_dir():
        return path
    if (found := latest_checkpoint(path)) is not None:
        return found
    raise CheckpointError(
        f"{path} is no checkpoint: it has neither {STATE}/ (a step folder) nor checkpoints/{LATEST} (a run's folder)"
        f"{how_to_bring(path)}"
    )


def is_checkpoint(path: str | Path) -> bool:
    """Return whether `path` is a step folder, or a run's folder with a checkpoint."""
    return (Path(path) / STATE).is_dir() or (Path(path) / "checkpoints" / LATEST).is_file()


# --- saving -----------------------------------------------------------------------------------------------------------


def save_checkpoint(
    path: Path,
    model_chunks: Sequence[nn.Module],
    *,
    hf_files: Callable[[Path], None],
    optimizer: MegatronOptimizer | None = None,
    train_state: TrainState | None = None,
) -> None:
    """Write a checkpoint under a temporary name and rename it. Collective.

    Args:
        path: Step folder to make; its parent is made too. Replaced if it exists.
        model_chunks: What this rank holds of the model, one chunk per virtual pipeline stage.
        hf_files: Fills the folder it is given with the Hugging Face files; called on rank 0.
        optimizer: Its state is saved too, unless None.
        train_state: State of the run; None where only weights are kept. A run owns the folder of its checkpoints, so
            that other unfinished checkpoints in it are removed first.

    Raises:
        CheckpointError: the file system is full or does not allow it. Nothing is left of the unfinished checkpoint.
    """
    write_checkpoint(path, lambda: sharded_state(model_chunks, optimizer), hf_files=hf_files, train_state=train_state)


def write_checkpoint(
    path: Path,
    state: Callable[[], dict[str, Any]],
    *,
    hf_files: Callable[[Path], None],
    train_state: TrainState | None = None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write a checkpoint as `save_checkpoint` does, of a state that was collected before. Collective.

    Args:
        path: Step folder to make.
        state: Gives the sharded state (model.checkpoint_state).
        hf_files: Fills the folder it is given with the Hugging Face files; called on rank 0.
        train_state: State of the run; None where only weights are kept.
        group: All processes, where another thread uses the default group at the same time.

    Raises:
        CheckpointError: the file system is full or does not allow it. Nothing is left of the unfinished checkpoint.
    """
    unfinished = path.with_name(UNFINISHED + path.name)
    try:
        on_main_process(lambda: _begin(unfinished, hf_files, train_state), group)
        write_tensors(unfinished / STATE, state(), group)
        write_manifest(unfinished, group)
        on_main_process(lambda: _commit(unfinished, path), group)
    except (OSError, CheckpointError, CheckpointException) as error:
        if dist.get_rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(
            f"cannot write the checkpoint {path}: {_reason(error)} ({free_space(path)}); what was written of it is "
            "removed"
        ) from error


def _begin(unfinished: Path, hf_files: Callable[[Path], None], train_state: TrainState | None) -> None:
    shutil.rmtree(unfinished, ignore_errors=True)
    if train_state is not None:
        remove_unfinished(unfinished.parent)
    (unfinished / STATE).mkdir(parents=True)
    (unfinished / HF_FILES).mkdir()
    hf_files(unfinished / HF_FILES)
    complete_config(unfinished / HF_FILES / CONFIG_FILE)
    if train_state is not None:
        write_json(unfinished / TRAIN_STATE, vars(train_state))


def complete_config(file: Path) -> None:
    """Add the older spelling of rotary embedding to a config.json that transformers 5 wrote."""
    if file.is_file():
        content = json.loads(file.read_text(encoding="utf-8"))
        if add_old_rope_spelling(content):
            write_json(file, content)


def _commit(unfinished: Path, path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
    unfinished.rename(path)
    sync_folder(path.parent)


def mark_latest(path: Path) -> None:
    """Make `path` the checkpoint that a restart continues from. The last thing that a save does."""
    write_text(path.parent / LATEST, path.name + "\n")


def remove_unfinished(checkpoints: Path) -> None:
    """Remove what interrupted saves left in a run's folder of checkpoints, which no other process may be using."""
    for unfinished in checkpoints.glob(f"{UNFINISHED}*"):
        shutil.rmtree(unfinished, ignore_errors=True)


def remove_old(newest: Path, keep_last: int, keep_every: int = 0) -> None:
    """Remove the step folders before the last `keep_last` up to `newest`, which has just been saved.

    Zero keeps all. Folders with other names, such as a user's copies, stay, and so do later steps, which a run that
    was set back has not reached again.

    Args:
        newest: The step folder that has just been saved.
        keep_last: How many to keep; 0: all.
        keep_every: Keep the multiples of this step too; 0: none.
    """
    steps = {step_of(path): path for path in newest.parent.iterdir() if STEP_FOLDER.fullmatch(path.name)}
    reached = sorted(step for step in steps if step <= step_of(newest))
    for step in reached[:-keep_last] if keep_last else []:
        if not keep_every or step % keep_every:
            removed = steps[step].rename(newest.with_name(UNFINISHED + steps[step].name))
            # What stays, because of a kill or of a file that NFS keeps while it is open, is removed by the next save.
            shutil.rmtree(removed, ignore_errors=True)


def step_of(path: Path) -> int:
    """Return the step of a step folder, from its name."""
    return int(path.name.removeprefix("step_"))


# --- loading ----------------------------------------------------------------------------------------------------------


def load_checkpoint(
    path: Path, model_chunks: Sequence[nn.Module], optimizer: MegatronOptimizer | None = None, verify: str = "full"
) -> None:
    """Read weights into what this rank holds, and with an optimizer its state. Collective; any layout.

    Args:
        path: Step folder.
        model_chunks: What this rank holds of the model, one chunk per virtual pipeline stage.
        optimizer: Its state is loaded too, unless None.
        verify: How files are compared with the manifest: "full" (sizes and checksums) or "sizes".

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged, of another model, has weights that are not finite, or
            is not safe to read.
        ConfigError: `verify` has another value.
    """
    check_metadata(path / STATE)
    check_manifest(path, verify)
    chunk: Any = model_chunks[0]
    groups_as_configured = _hyperparameters(optimizer)
    wanted = sharded_state(model_chunks, optimizer, is_loading=True)
    try:
        loaded = dist_checkpointing.load(wanted, str(path / STATE))
    except (Exception, CheckpointException) as error:  # of many kinds; all mean that this folder does not fit
        if chunk.lora is None and (path / TRAIN_STATE).is_file() and read_train_state(path).base:
            raise CheckpointError(
                f"{path} holds only the adapters of a LoRA run: use `python -m tools.convert merge` for a whole model, "
                "or `export-lora` for PEFT's files"
            ) from None
        raise CheckpointError(f"{path} does not load into this model: {_reason(error)}") from error
    problems = [
        _fill(chunk, loaded.get(f"model{number}", {}), wanted[f"model{number}"])
        for number, chunk in enumerate(model_chunks)
    ]
    problem = next(filter(None, problems), None)
    raise_everywhere(f"{path} {problem}" if problem else None)
    if optimizer is not None:
        optimizer.load_state_dict(with_groups_of(optimizer, loaded["optimizer"]))
        round_from_main_weights(optimizer)
        _restore_hyperparameters(optimizer, groups_as_configured, read_train_state(path).updates_done)


def _fill(chunk: Any, state: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """Load a chunk's state, which is empty for a stage without layers, and return what is wrong with it."""
    keys = chunk.load_state_dict(state, strict=False)
    keep_first_values(chunk, state)
    missing = [key for key in keys.missing_keys if key in wanted or chunk.lora is None]  # frozen weights are not saved
    if wrong := [key for key in (*missing, *keys.unexpected_keys) if not key.endswith("_extra_state")]:
        return f"does not fit this model: {', '.join(wrong[:5])}"
    # With adapters they alone are read: frozen weights may not be filled yet.
    read = {name: tensor for name, tensor in local_tensors(chunk) if chunk.lora is None or ".lora." in name}
    if bad := nonfinite(read):
        return f"has values that are not finite (NaN or infinity) in {', '.join(bad[:3])}; use another step"
    return None


def read_train_state(path: Path) -> TrainState:
    """Return the state of the run that saved a step folder.

    Raises:
        CheckpointError: the folder holds only weights, or the file is damaged.
        StorageError: the file cannot be read because storage fails.
    """
    file = path / TRAIN_STATE
    if not patiently(file.is_file, file):
        raise CheckpointError(f"{path} holds only weights (no {TRAIN_STATE}); start from it with model.init_from")
    try:
        state = TrainState(**json.loads(patiently(file.read_bytes, file)))
        if {type(state.step), type(state.updates_done)} != {int}:
            raise TypeError("step and updates must be integers")
        parts = (state.data, state.config, state.bad_steps, state.metrics, state.fp8)
        if not all(isinstance(part, dict) for part in parts):
            raise TypeError("data, config, bad_steps, metrics and fp8 must be JSON objects")
        if not isinstance(state.base, str):
            raise TypeError("base must be a string")
    except (OSError, ValueError, TypeError) as error:  # unreadable, not UTF-8, not JSON, or other keys or types
        raise CheckpointError(f"{file} is damaged ({_reason(error)}); use another step") from None
    return state


def _hyperparameters(optimizer: MegatronOptimizer | None) -> list[dict[str, Any]]:
    groups = optimizer.param_groups if optimizer is not None else []
    return [{key: value for key, value in group.items() if key not in ("params", "step")} for group in groups]


def _restore_hyperparameters(optimizer: MegatronOptimizer, configured: list[dict[str, Any]], step: int) -> None:
    """Put the configured hyperparameters and Adam's step count back into the optimizer's groups.

    Loading replaced them by those of some group with the same weight decay, which is all that megatron-core tells
    groups apart by, and left `step` out of the groups of an optimizer that rank 0 has no part in. Every rank has the
    same groups in the same order, some of them perhaps empty.
    """
    for group, hyperparameters in zip(optimizer.param_groups, configured, strict=True):
        params = group["params"]
        group.clear()
        group.update(hyperparameters, params=params, step=step)


def _reason(error: BaseException) -> str:
    """Return the first line of an error, at most 300 characters; of the first process that has one."""
    if isinstance(error, CheckpointException):
        failures = list(error.failures.values())
        error = failures[0][0] if failures else CheckpointError("another process could not do its part")
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return (str(error).strip() or type(error).__name__).splitlines()[0].removeprefix("Worker failure: ")[:300]
