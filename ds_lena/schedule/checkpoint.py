"""LENA's own part of a checkpoint: O(L) plain numbers, by layer name."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ..config import LenaConfig, group_fault
from ..errors import StateError
from ..keys import BASES, VARIANTS, group_keys, is_number
from .clock import ClockState, RunPlan, scalar
from .noise import Tally
from .schedule import Schedule

logger = logging.getLogger("ds_lena")

STATE_VERSION = 2
"""An engine adds "pieces": for each tensor of the optimizer its `[name, start, length, offset]`. Version 1 has none."""
_WAY_OUT = "Restore the file, or load an earlier checkpoint."
_VECTORS = ("weight", "progress", "gain", "warmup", "capped")


def to_dict(schedule: Schedule) -> dict[str, Any]:
    """All that a schedule remembers."""
    clock, state = schedule.clock, schedule.state
    vectors = {name: getattr(state, name).tolist() for name in _VECTORS}
    averages = state.averages.T.tolist()
    layers = {
        name: {"averages": averages[i], **{key: vectors[key][i] for key in _VECTORS}}
        for i, name in enumerate(schedule.table.names)
    }
    return {
        "version": STATE_VERSION,
        "variant": schedule.config.variant,
        "base": schedule.config.base,
        "update": clock.updates,
        "skipped": schedule.skipped,
        "nonfinite": int(schedule.nonfinite),
        "n": float(schedule.n),
        "done": float(clock.done),
        "planned": None if clock.planned is None else float(clock.planned),
        "planned_for": float(clock.planned_for),
        "base_in_micro_batches": clock.k,
        "base_samples": schedule.base_samples,
        "total_steps": clock.plan.total_steps,
        "planned_n": clock.plan.planned_n,
        "micro_batch_size": clock.plan.micro_batch_size,
        "tally": schedule.tally.to_dict(),
        "layers": layers,
    }


def require_loadable(saved: object, config: LenaConfig) -> None:
    """Raise `StateError` if a run with these keys cannot resume from the saved state."""
    state = require_whole(saved)
    if state["variant"] != config.variant:
        raise StateError(
            f'LENA: the checkpoint was written with "variant": "{state["variant"]}", this run has '
            f'"{config.variant}", whose averages are others. Set "variant" as in the checkpoint.'
        )
    if state["base"] != config.base:
        raise StateError(
            f'LENA: the checkpoint was written with "base": "{state["base"]}", this run has "{config.base}", '
            'whose state is another. Set "base" as in the checkpoint, or load the model\'s weights only.'
        )


def require_groups(groups: object, base: str) -> None:
    """Raise `StateError` if the saved parameter groups, `state_dict()["param_groups"]`, cannot be gone on with.

    They may be of a stock optimizer, whose other entries are left alone.
    """
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise StateError(
            f'LENA: "param_groups" of the checkpoint is {_shown(groups)}, and should be a list of dictionaries. '
            f"{_WAY_OUT}"
        )
    for number, group in enumerate(groups):
        missing = [key for key in group_keys(base) if key not in group]
        if missing:
            raise StateError(
                f'LENA: parameter group {number} of the checkpoint has no "{missing[0]}", which "base": '
                f'"{base}" needs. It is damaged, or another kind of optimizer wrote it. Restore the file, or '
                "load the model's weights only."
            )
        fault = group_fault(group, base)
        if fault:
            raise StateError(f"LENA: parameter group {number} of the checkpoint has {fault}. {_WAY_OUT}")


# -- what a state may hold --------------------------------------------------------------------------------------------


class _Kind(NamedTuple):
    """What a value may be, in words and as a test."""

    words: str
    holds: Callable[[Any], bool]


def _or_none(kind: _Kind) -> _Kind:
    return _Kind(f"None or {kind.words}", lambda value: value is None or kind.holds(value))


def _one_of(words: Collection[str]) -> _Kind:
    return _Kind(f"one of {', '.join(words)}", lambda value: isinstance(value, str) and value in words)


def _are_numbers(value: object, length: int) -> bool:
    return isinstance(value, list) and len(value) == length and all(map(is_number, value))


def _are_moments(value: object) -> bool:
    rows = isinstance(value, list) and len(value) == 3 and all(_are_numbers(row, 3) for row in value)
    return rows and value[0][0] <= 1 and all(value[i][i] >= 0 for i in range(3))  # type: ignore[index]


_FLAG = _Kind("true or false", lambda value: isinstance(value, bool))
_COUNT = _Kind("a whole number >= 0", lambda value: type(value) is int and 0 <= value < 1 << 63)
_NUMBER = _Kind("a finite number", is_number)
_AMOUNT = _Kind("a finite number >= 0", lambda value: is_number(value) and value >= 0)
_POSITIVE = _Kind("a finite number > 0", lambda value: is_number(value) and value > 0)
_SHARE = _Kind("a number in [0, 1]", lambda value: is_number(value) and 0 <= value <= 1)
_BY_NAME = _Kind("a dictionary", lambda value: isinstance(value, dict))

_ENTRIES = {
    "variant": _one_of(VARIANTS),
    "base": _one_of(BASES),
    "update": _COUNT,
    "skipped": _COUNT,
    "nonfinite": _COUNT,
    "n": _AMOUNT,
    "done": _AMOUNT,
    # Infinite for a run without an end, which has no warm-up.
    "planned": _Kind("None or a number > 0", lambda value: value in (None, math.inf) or _POSITIVE.holds(value)),
    "planned_for": _AMOUNT,
    "base_in_micro_batches": _POSITIVE,
    "base_samples": _or_none(_POSITIVE),
    "total_steps": _or_none(_POSITIVE),
    "planned_n": _or_none(_POSITIVE),
    "micro_batch_size": _or_none(_POSITIVE),
    "layers": _BY_NAME,
}
_SET_BY_AN_UPDATE = ("n", "done", "planned", "planned_for")
"""0 or None before the first update, and only then."""
_AVERAGES = _Kind("a list of two finite numbers", lambda value: _are_numbers(value, 2))
"""Noise too may be below 0: by rounding, where the micro-gradients are nearly the same."""
_OF_LAYER = {
    "averages": _AVERAGES,
    "weight": _SHARE,
    "progress": _AMOUNT,
    "gain": _Kind("a finite number >= 1", lambda value: is_number(value) and value >= 1),
    "warmup": _SHARE,
    "capped": _FLAG,
}
# The authors' averages may go anywhere with n > 1000, and their gain and S with them.
_OF_LAYER_OTHERWISE = _OF_LAYER | dict.fromkeys(("progress", "gain", "warmup"), _NUMBER)
_OF_TALLY = {
    "moments": _Kind("three lists of three finite numbers, the first <= 1, squares >= 0", _are_moments),
    "squares": _SHARE,
    "micro_batches": _AMOUNT,
    "samples": _AMOUNT,
}


def require_whole(saved: object) -> dict[str, Any]:
    """The saved state, with all that LENA remembers. It needs no keys of a run.

    Raises:
        StateError: the state is of a version that is not read here, something is missing, or has a value that no run
            has.
    """
    if not isinstance(saved, dict):
        raise StateError(f"LENA: the checkpoint's LENA state is {_shown(saved)}, and no dictionary. {_WAY_OUT}")
    if type(saved.get("version")) is not int or saved["version"] not in (1, STATE_VERSION):
        raise StateError(
            f"LENA: the checkpoint's LENA state has version {saved.get('version')!r}; this ds_lena reads versions 1 "
            f"to {STATE_VERSION}. Load it with the ds_lena that wrote it."
        )
    _require(saved, _ENTRIES)
    for key in _SET_BY_AN_UPDATE if saved["update"] else ():
        if not saved[key]:
            raise _damaged(f'"{key}" is {saved[key]!r} after update {saved["update"]}')
    for name, layer in saved["layers"].items():
        _require(layer, _OF_LAYER if saved["variant"] == "default" else _OF_LAYER_OTHERWISE, f'in layer "{name}" ')
    if "tally" in saved:  # older states have none
        _require(saved["tally"], _OF_TALLY, 'in "tally" ')
    return saved


def _require(holder: object, kinds: dict[str, _Kind], where: str = "") -> None:
    for key, kind in kinds.items():
        if not isinstance(holder, dict) or key not in holder:
            raise _damaged(f'{where}"{key}" is nothing, and should be {kind.words}')
        if not kind.holds(holder[key]):
            raise _damaged(f'{where}"{key}" is {_shown(holder[key])}, and should be {kind.words}')


def _damaged(what: str) -> StateError:
    return StateError(f"LENA: the checkpoint's LENA state is damaged: {what}. {_WAY_OUT}")


def _shown(value: object) -> str:
    return repr(value)[:80]


def load(schedule: Schedule, saved: dict[str, Any]) -> None:
    """Resume from a saved state. Layers are matched by name. A layer that is not in it starts fresh, with a warning.

    Raises:
        StateError: see `require_loadable`. Nothing has changed then.
    """
    require_loadable(saved, schedule.config)
    device = schedule.device
    schedule.clock = ClockState(
        done=scalar(saved["done"], device),
        planned=None if saved["planned"] is None else scalar(saved["planned"], device),
        planned_for=scalar(saved["planned_for"], device),
        updates=saved["update"],
        k=saved["base_in_micro_batches"],
        plan=RunPlan(saved["total_steps"], saved["planned_n"], saved["micro_batch_size"]),
        is_resumed=True,
    )
    schedule.n = scalar(saved["n"], device)
    schedule.skipped = saved["skipped"]
    if "tally" in saved:  # older states have none
        schedule.tally = Tally.from_dict(saved["tally"], device)
    schedule.nonfinite = torch.tensor(saved["nonfinite"], dtype=torch.long, device=device)
    if schedule.config.base_batch_size is None:
        schedule.base_samples = saved["base_samples"]
    _load_layers(schedule, saved["layers"])


def _load_layers(schedule: Schedule, saved: dict[str, dict[str, Any]]) -> None:
    names = schedule.table.names
    missing = [name for name in names if name not in saved]
    unused = sorted(saved.keys() - set(names))
    if missing or unused:
        logger.warning(
            "LENA: the checkpoint does not fit the model's layers. Not in the checkpoint, start fresh: %s. Not in "
            'the model, ignored: %s. Were "layer", "exclude" or the names of the parameters changed?',
            missing or "none",
            unused or "none",
        )
    found = [(i, saved[name]) for i, name in enumerate(names) if name in saved]
    loaded = {}
    for key in ("averages", *_VECTORS) if found else ():
        vector = getattr(schedule.state, key).clone()
        values = torch.tensor([layer[key] for _, layer in found], dtype=vector.dtype, device=schedule.device)
        vector[..., [i for i, _ in found]] = values.T if key == "averages" else values
        loaded[key] = vector
    schedule.state = replace(schedule.state, **loaded)
