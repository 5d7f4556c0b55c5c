"""`model.init_optimizer`: a stage takes Adam's moments from the run before it, not only the weights.

The run itself begins at step 1, with its own schedule and its own data. Only Adam's step count continues, because the
moments have been averaged over that many updates already: at a count of 1 they would be divided by 1 - beta.
"""

from __future__ import annotations

from pathlib import Path

from model.checkpoint import STATE, TRAIN_STATE, is_checkpoint, read_train_state
from model.checkpoint_metadata import stored_dtype
from model.config import ConfigError
from training.config import RunConfig
from training.dtypes import DTYPES
from training.optimizer_config import OptimizerConfig

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def check_init_optimizer(config: RunConfig, weights: Path) -> None:
    """Check that the optimizer's state in `weights` fits the run.

    Raises:
        ConfigError: there is none, or it is of other parameters or of another precision.
        CheckpointError: the checkpoint is not safe to read.
    """
    wrong = f"model.init_optimizer=true, but {weights}"
    if not is_checkpoint(weights) or not (weights / TRAIN_STATE).is_file():
        raise ConfigError(f"{wrong} holds weights alone; set it to false, or start from the folder of a run")
    if config.lora.rank:
        raise ConfigError("model.init_optimizer=true: new adapters have no optimizer state yet; set it to false")
    before = read_train_state(weights).config
    if set(frozen := before.get("freeze", [])) != set(config.freeze):
        raise ConfigError(f"{wrong} was trained with freeze={frozen}; set it to false, or the same")
    if (dtype := stored_dtype(weights / STATE)) != DTYPES[config.train.precision]:
        raise ConfigError(f"{wrong} was trained with train.precision={NAMES[dtype]}; set it to false, or the same")
    for key in ("exp_avg_dtype", "exp_avg_sq_dtype"):
        was = before.get("optimizer", {}).get(key, getattr(OptimizerConfig, key))
        if was != getattr(config.optimizer, key):
            raise ConfigError(f"{wrong} was trained with optimizer.{key}={was}; set it to false, or the same")
