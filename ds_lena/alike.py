"""What the optimizer files of one part of a model have to hold alike, since each rank goes on from its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import StateError
from .keys import group_keys, number_in


def alike_in(groups: Sequence[Mapping[str, Any]], states: Mapping[int, Mapping[str, Any]], base: str) -> dict[str, Any]:
    """The hyperparameters of all groups and the updates of all tensors, by what an error calls them.

    `groups`, `states`: `state_dict()["param_groups"]` and `state_dict()["state"]`.

    Raises:
        ValueError: a number of updates is no whole number, or below 0.
    """
    options = {
        f'"{name}" of parameter group {number}': number_in(group[name])
        for number, group in enumerate(groups)
        for name in group_keys(base)
        if name in group
    }
    steps = {number: float(state["step"]) for number, state in states.items() if "step" in state}
    for number, step in steps.items():
        if not (step >= 0 and step.is_integer()):
            raise ValueError(f"tensor {number} has had {step:g} updates")
    return options | {f"the number of updates of tensor {number}": step for number, step in steps.items()}


def require_alike(files: Mapping[Path, Mapping[str, Any]]) -> None:
    """Raise `StateError` if files do not go on alike: other hyperparameters, other numbers of updates."""
    known: dict[str, tuple[Any, Path]] = {}
    for path, values in files.items():
        for what, value in values.items():
            other, first = known.setdefault(what, (value, path))
            if value != other:
                raise StateError(
                    f"LENA: {what} is {value} in {path} and {other} in {first}. They are of two saves, or one is "
                    "damaged. Restore the files of one save, or load an earlier checkpoint."
                )
