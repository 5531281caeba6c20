"""The errors of ds_lena. Each message says what is wrong, what was given, what is allowed and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class LenaError(Exception):
    """Base class of every error that ds_lena raises on purpose."""


class ConfigError(LenaError, ValueError):
    """A key or a value of the optimizer entry is not allowed."""


class UnsupportedError(LenaError, NotImplementedError):
    """A feature is in use under which LENA would not be exact. LENA refuses it."""


class StateError(LenaError, RuntimeError):
    """Calls came in an order that has no right result, or a checkpoint does not fit."""


def require_entries(saved: Mapping[str, Any], like: Mapping[str, Any], who: str, of: str) -> None:
    """Raise `StateError` if a saved state lacks an entry of one like it. `who`, `of`: who loads it, of what it is."""
    missing = like.keys() - saved.keys()
    if missing:
        raise StateError(
            f'{who}: the state that is to be loaded has no "{min(missing)}". Give load_state_dict() what state_dict() '
            f"of {of} has returned."
        )
