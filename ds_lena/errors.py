"""The errors of ds_lena. Each message says what is wrong, what was given, what is allowed and what to do."""


class LenaError(Exception):
    """Base of every error raised on purpose by ds_lena."""


class ConfigError(LenaError, ValueError):
    """A key or a value of the optimizer entry is not allowed."""


class UnsupportedError(LenaError, NotImplementedError):
    """A layout in which LENA would not be exact, and which it therefore refuses."""


class StateError(LenaError, RuntimeError):
    """Calls came in an order in which no right result exists, or a checkpoint does not fit."""
