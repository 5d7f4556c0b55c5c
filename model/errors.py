"""The error for a configuration that cannot work."""


class ConfigError(ValueError):
    """A configuration that cannot work. The message names the option or file and says how to fix it."""
