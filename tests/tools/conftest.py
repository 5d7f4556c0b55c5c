"""The shards and the configuration of a run."""

from tests.training_data import config_file, shards

__all__ = ["config_file", "shards"]
