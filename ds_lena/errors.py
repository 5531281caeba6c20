"""The errors of ds_lena. Each message says what is wrong, what was given, what is allowed and what to do."""


class LenaError(Exception):
    """Base class of every error that ds_lena raises on purpose."""


class ConfigError(LenaError, ValueError):
    """A key or a value of the optimizer entry is not allowed."""


class UnsupportedError(LenaError, NotImplementedError):
    """A feature is in use under which LENA would not be exact. LENA refuses it."""


class StateError(LenaError, RuntimeError):
    """Calls came in an order that has no right result, or a checkpoint does not fit."""
