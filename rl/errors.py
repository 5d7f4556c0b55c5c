"""Errors of rollouts that a user can fix. Each message names the file or the engine and says what to do."""

from __future__ import annotations

from data_pipeline.errors import DataError


class RolloutError(DataError):
    """Rollouts cannot be read, or are not those that were asked for."""


class EngineError(DataError):
    """An engine cannot draw rollouts, or does not answer."""
