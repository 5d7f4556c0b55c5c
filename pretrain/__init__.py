"""Pretraining and long-context continuation: the entry and its differences from other stages."""
