"""The error of the configuration, known without the configuration, which takes a quarter of a command's start."""


class ConfigError(Exception):
    """The configuration cannot be used; the message lists every mistake with the key's full name."""
