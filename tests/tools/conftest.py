"""Shards and configuration of a run; folders that were converted."""

from tests.tools.converted_folders import folders
from tests.training_data import config_file, shards

__all__ = ["config_file", "folders", "shards"]
