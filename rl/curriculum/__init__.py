"""Which prompts an iteration draws: pass rates, tiers, weights, the draw itself, and what survives a restart.

Everything here is numpy in one process: the same state, seed and iteration give the same prompts everywhere. What knows
the model, the engines or the files of prompts belongs in `rl`.
"""
