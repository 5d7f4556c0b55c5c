"""The engine: configuration, loop, step, optimizer and records of a run."""

import model as model  # before megatron-core, which it prepares for this machine
