"""Errors that a user can fix. Each message names the option or file and says what to do."""


class ConfigError(ValueError):
    """A configuration that cannot work."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written, or is not safe to read."""


class WeightsError(ValueError):
    """Weights that do not fit the model, or cannot be read or written. The message names the tensors or the file."""


class ConversionError(ValueError):
    """A conversion that cannot be carried out. The message names the folder or option and says how to fix it."""


class ImageTokenError(ValueError):
    """The image tokens of a pack do not fit its images."""
