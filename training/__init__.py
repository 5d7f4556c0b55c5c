"""The engine of all stages: configuration, loop, step, optimizer, run folder, metrics, checkpoint policy."""
