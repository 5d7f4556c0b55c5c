"""Pretraining and long-context continuation: the training loop and its entry."""
