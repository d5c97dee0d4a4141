"""The errors that a user's input or data can cause; a launch script reports them (cli.py)."""


class ConfigError(ValueError):
    """Bad input. The message is one sentence that names the field, the value and what to do."""


class DataError(ConfigError):
    """Data that can't be read while a run trains, which may have passed when it starts again."""


class PortInUse(ConfigError):
    """The ranks can't meet at their port, which may pass: a run that ended may still hold it."""


class NotWritten(ConfigError):
    """A file could not be written, which may pass: a full disk can get room again."""
