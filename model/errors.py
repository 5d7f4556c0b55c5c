"""Errors that a user can fix. Each message names the option or file and says what to do."""


class ConfigError(ValueError):
    """A configuration that cannot work."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written, or is not safe to read."""
