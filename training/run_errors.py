"""Errors of a run that a user can fix, beside those of a step."""

from __future__ import annotations

from model.errors import ConfigError


class NodeError(ConfigError):
    """This machine cannot run its processes. Others may: it is printed once per machine."""


class RunFolderError(OSError):
    """A file of the run folder cannot be written. The message names it and the cause."""


class NonDeterministicStep(ArithmeticError):
    """The same packs gave different gradients when they were computed again."""
