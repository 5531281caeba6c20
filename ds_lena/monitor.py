"""What LENA measured and decided in the last applied update: `report`, one plain dict, and numbers for loggers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .errors import StateError
from .optimizer import LENA

_INSIDE = ("basic_optimizer", "optimizer", "deepspeed", "model_wrapped")


def report(source: Any) -> dict[str, Any]:
    """The state of LENA after the last applied update; the same on every rank. No collective: any one rank may call it.

    Args:
        source: a DeepSpeed engine, an HF Trainer, an optimizer wrapper, or a `LENA`.

    Returns:
        `update` t, `n` micro-gradients of it, `base` k, `skipped` and `nonfinite` counts over the run, `noise_scale`
        (in micro-batches, inf where the signal is not positive) and `gain` of the model as one layer, and `layers`: by
        layer name `gain` r, `factor` (what multiplied the learning rate), `warmup` f, `state` S, `noise` s2,
        `signal` m2, `noise_scale`, `capped`. Before the first update: update 0, gains 1.

    Raises:
        StateError: `source` holds no LENA.
    """
    lena = find_lena(source)
    if lena is None:
        raise StateError(
            f"ds_lena.report: no LENA optimizer in {type(source).__name__}. Pass an engine, a Trainer (after train() "
            'has begun) or a LENA; is "optimizer": {"type": "LENA"} in the DeepSpeed JSON?'
        )
    return lena.tracker.report()


def events(report: Mapping[str, Any]) -> dict[str, float]:
    """What a report says of the model, as flat names and numbers: `lena/gain`, `lena/noise_scale` (left out where it is
    infinite) and `lena/warmup`, the mean warm-up factor of the layers.
    """
    parts = report["layers"]
    warmup = sum(layer["warmup"] for layer in parts.values()) / max(len(parts), 1)
    return _finite({"lena/gain": report["gain"], "lena/noise_scale": report["noise_scale"], "lena/warmup": warmup})


def layer_events(report: Mapping[str, Any]) -> dict[str, float]:
    """The same three of every layer, and of nothing else: `lena/layers/NAME/gain` and so on."""
    keys = ("gain", "noise_scale", "warmup")
    return _finite(
        {f"lena/layers/{name}/{key}": layer[key] for name, layer in report["layers"].items() for key in keys}
    )


def _finite(found: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in found.items() if math.isfinite(value)}


def find_lena(source: Any) -> LENA | None:
    """The LENA inside of an engine, Trainer or wrapper, None where there is none."""
    seen: set[int] = set()
    waiting = [source]
    while waiting:
        thing = waiting.pop(0)
        if isinstance(thing, LENA):
            return thing
        if thing is None or id(thing) in seen:
            continue
        seen.add(id(thing))
        waiting += [getattr(thing, name, None) for name in _INSIDE]
    return None
