"""Pretraining and long-context continuation: the entry and what differs from other stages."""
