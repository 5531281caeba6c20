"""What the default run leaves out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def full(values: Iterable[Any]) -> list[Any]:
    """The same values for `parametrize`, run by `make test-all` alone.

    Every fault that they are known to show is shown by another value in the default run.
    """
    return [pytest.param(*value if isinstance(value, tuple) else [value], marks=pytest.mark.full) for value in values]


def rest(everything: Iterable[Any], default: Iterable[Any]) -> list[Any]:
    """`default`, and under the marker `full` what is beside it in `everything`."""
    chosen = list(default)
    return [*chosen, *full(value for value in everything if value not in chosen)]
