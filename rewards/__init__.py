"""Scores of answers for reinforcement learning: extraction, verifiers, judges. It knows neither model nor data."""
