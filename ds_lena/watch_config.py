"""The keys of `ds_lena.watch` and of the JSON entry `noise_scale`, checked when they are given."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .errors import ConfigError
from .keys import KEYS, is_count, is_number


@dataclass(frozen=True)
class WatchConfig:
    """The checked keys.

    `layer`, `smoothing`, `exclude`, `micro_batch_size`: as LENA's, see docs/keys.md. `tokens_per_sample`: for the
    critical batch in tokens. `differences`: where an update has one micro-batch in all, tell the noise from the
    gradients of two updates; it keeps a copy of the gradient. `log`: a file that gets a JSON line, written by rank 0
    every `log_every` updates. `enabled`: False switches the JSON entry off. `given`: the keys that the user wrote.
    """

    layer: str = "tensor"
    smoothing: float | None = None
    exclude: tuple[str, ...] = ()
    micro_batch_size: int | None = None
    tokens_per_sample: float | None = None
    differences: bool = False
    log: str | None = None
    log_every: int = 10
    enabled: bool = True
    given: frozenset[str] = field(default=frozenset(), compare=False)

    @classmethod
    def from_keys(cls, keys: Mapping[str, Any]) -> WatchConfig:
        """Check the keys as a user wrote them. Raise `ConfigError` for the first that is wrong."""
        if isinstance(keys.get("log"), os.PathLike):
            keys = {**keys, "log": os.fspath(keys["log"])}
        known = list(cls().keys())
        for name, value in keys.items():
            if name not in known:
                close = difflib.get_close_matches(name.lower(), known, n=1)
                hint = f'Did you mean "{close[0]}"? ' if close else ""
                raise ConfigError(
                    f'ds_lena.watch: unknown key "{name}" (value {value!r}). {hint}Known keys: {", ".join(known)}.'
                )
            accepts, allowed = _allowed(name)
            if not accepts(value):
                raise ConfigError(f'ds_lena.watch: "{name}": {value!r} is not allowed; allowed is {allowed}.')
        return cls(**{**keys, "exclude": tuple(keys.get("exclude", ()))}, given=frozenset(keys))

    def keys(self) -> dict[str, Any]:
        """All keys."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "given"}

    def contradicted_by(self, known: Mapping[str, Any]) -> str | None:
        """The first given key that is another one in `known`; None if there is none."""
        return next((key for key in sorted(self.given & known.keys()) if getattr(self, key) != known[key]), None)


def _allowed(name: str) -> tuple[Callable[[Any], bool], str]:
    if name in KEYS:
        return KEYS[name].accepts, KEYS[name].allowed
    return {
        "tokens_per_sample": (
            lambda value: value is None or (is_number(value) and value > 0),
            "null or a finite number > 0",
        ),
        "differences": (lambda value: isinstance(value, bool), "true or false"),
        "enabled": (lambda value: isinstance(value, bool), "true or false"),
        "log": (lambda value: value is None or (isinstance(value, str) and value != ""), "null or the path of a file"),
        "log_every": (is_count, "a whole number of updates >= 1"),
    }[name]
