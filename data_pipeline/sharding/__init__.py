"""Inputs to shards: cut into tasks, run by many processes, each stoppable at any moment and done exactly once."""
