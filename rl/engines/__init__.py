"""Engines, which draw the policy's rollouts: a copy of the trained model in this process, or servers."""
