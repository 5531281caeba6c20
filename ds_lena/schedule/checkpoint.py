"""LENA's own part of a checkpoint: O(L) plain numbers, by layer name."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..config import LenaConfig
from ..errors import StateError
from .clock import ClockState, RunPlan, scalar
from .noise import Tally
from .schedule import Schedule

logger = logging.getLogger("ds_lena")

STATE_VERSION = 2
"""An engine adds "pieces": for each tensor of the optimizer its `[name, start, length, offset]`. Version 1 has none."""
_COUNTS = ("update", "skipped", "nonfinite")
_AMOUNTS = ("n", "done", "planned_for")
_OR_NONE = ("planned", "base_in_micro_batches", "base_samples", "total_steps", "planned_n", "micro_batch_size")
_LARGEST = sys.float_info.max  # Python's integers go further
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


def require_loadable(saved: dict[str, Any], config: LenaConfig) -> None:
    """Raise `StateError` if a run with these keys cannot resume from the saved state."""
    if saved.get("version") not in (1, STATE_VERSION):
        raise StateError(
            f"LENA: the checkpoint's LENA state has version {saved.get('version')!r}; this ds_lena reads versions 1 "
            f"to {STATE_VERSION}. Load it with the ds_lena that wrote it."
        )
    _require_whole(saved)
    if saved["variant"] != config.variant:
        raise StateError(
            f'LENA: the checkpoint was written with "variant": "{saved["variant"]}", this run has '
            f'"{config.variant}", whose averages are others. Set "variant" as in the checkpoint.'
        )
    if saved["base"] != config.base:
        raise StateError(
            f'LENA: the checkpoint was written with "base": "{saved["base"]}", this run has "{config.base}", '
            'whose state is another. Set "base" as in the checkpoint, or load the model\'s weights only.'
        )


def _require_whole(saved: dict[str, Any]) -> None:
    """Raise `StateError` if something is missing, or is not what it should be."""

    def require(holder: object, key: str, is_right: Callable[[Any], bool], where: str = "") -> None:
        if not isinstance(holder, dict) or key not in holder or not is_right(holder[key]):
            found = repr(holder[key])[:80] if isinstance(holder, dict) and key in holder else "nothing"
            raise StateError(
                f'LENA: the checkpoint\'s LENA state is damaged: {where}"{key}" is {found}. Restore the file, or '
                "load an earlier checkpoint."
            )

    for key in ("variant", "base"):
        require(saved, key, lambda value: isinstance(value, str))
    for key in _COUNTS:
        require(saved, key, lambda value: type(value) is int and value >= 0)
    for key in _AMOUNTS:
        require(saved, key, _is_amount)
    for key in _OR_NONE:
        require(saved, key, lambda value: value is None or _is_amount(value))
    require(saved, "layers", lambda layers: isinstance(layers, dict))
    for name, layer in saved["layers"].items():
        where = f'in layer "{name}" '
        require(layer, "averages", _are_averages, where)
        for key in _VECTORS:
            require(layer, key, _is_finite, where)


def _are_averages(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_finite, value))


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and abs(value) <= _LARGEST


def _is_amount(value: object) -> bool:
    """Infinite is allowed: a run without an end is planned so."""
    return isinstance(value, (int, float)) and (0 <= value <= _LARGEST or value == math.inf)


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
