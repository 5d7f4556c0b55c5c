from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch import train
from tests.training_data import config_file, shards

__all__ = ["config_file", "shards"]


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that gives the folder of a run that nothing disturbed, with a checkpoint at its end.

    Its arguments are the configuration file, which is the same in all tests, and overrides. Runs are made once.
    """
    made: dict[tuple[str, ...], Path] = {}

    def run(config: Path, *overrides: str) -> Path:
        if overrides not in made:
            made[overrides] = tmp_path_factory.mktemp("undisturbed")
            train(config, [*overrides, f"train.output_dir={made[overrides]}", "checkpoint.save_interval=1000"])
        return made[overrides]

    return run
