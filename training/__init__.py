"""The engine of all stages: configuration, loop, step, optimizer, run folder, metrics, checkpoint policy."""

import model as model  # before megatron-core, which it prepares for this machine
