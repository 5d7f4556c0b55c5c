"""Reinforcement learning: rollouts of the policy, their rewards, and the stage that trains on them."""
