"""What LENA measured and decided in the last applied update: `report`, a plain dictionary, and numbers for loggers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from . import advice
from .errors import StateError
from .optimizer import LENA, controller_of
from .schedule import algorithm
from .schedule.schedule import Schedule
from .watching import Watch

_INSIDE = ("basic_optimizer", "optimizer", "deepspeed", "model_wrapped")


def report(source: Any) -> dict[str, Any]:
    """The state of LENA after the last applied update. It is the same on every rank.

    There is no collective in it, so one rank alone may call it.

    Args:
        source: a DeepSpeed engine, an HF Trainer, an optimizer wrapper, or a `LENA`. Of another optimizer that
            `ds_lena.watch` watches, the report is that of the watch.

    Returns:
        A plain dictionary. Before the first update: update 0, gains 1.

        - `update`: t, the applied updates. `n`: micro-batches of the last one. `base`: k.
        - `skipped`, `nonfinite`: counts over the run, of skipped updates, and of layers with statistics not finite.
        - `gain`, `noise_scale`: those of the model as one layer. A noise scale is in micro-batches, and inf if the
          signal is not positive.
        - `layers`: by layer name, `gain` r, `factor` (what multiplied the learning rate), `warmup` f, `state` S,
          `noise` s2, `signal` m2, `noise_scale`, `capped`.

    Raises:
        StateError: `source` holds no LENA.
    """
    lena = find_lena(source)
    watch = find_watch(source) if lena is None else None
    if watch is not None:
        return watch.report()
    if lena is None:
        raise StateError(
            f"ds_lena.report: no LENA optimizer in {type(source).__name__}, and nothing watches it "
            f"(ds_lena.watch). Pass an engine, a Trainer (after train() "
            'has begun) or a LENA; is "optimizer": {"type": "LENA"} in the DeepSpeed JSON?'
        )
    return report_of(controller_of(lena).schedule)


def report_of(schedule: Schedule) -> dict[str, Any]:
    """See `report`. This waits for the numbers from the device."""
    state = schedule.state
    noise, signal = schedule.noise_and_signal()
    all_noise, all_signal = (float(x) for x in algorithm.model_noise_and_signal(noise, signal, state.weight))
    model_gain = algorithm.model_gain(noise, signal, state.weight, schedule.n.clamp(min=1), schedule.clock.k)
    columns = {
        "gain": state.gain.tolist(),
        "factor": algorithm.step_factor(state, schedule.config).tolist(),
        "warmup": state.warmup.tolist(),
        "state": state.progress.tolist(),
        "noise": noise.tolist(),
        "signal": signal.tolist(),
        "noise_scale": [advice.noise_scale(s, m) for s, m in zip(noise.tolist(), signal.tolist(), strict=True)],
        "capped": state.capped.tolist(),
    }
    names = schedule.table.names
    return {
        "update": schedule.updates,
        "n": int(schedule.n),
        "base": schedule.clock.k,
        "skipped": schedule.skipped,
        "nonfinite": int(schedule.nonfinite),
        "noise_scale": advice.noise_scale(all_noise, all_signal),
        "gain": float(model_gain),
        "layers": {name: {key: column[i] for key, column in columns.items()} for i, name in enumerate(names)},
    }


def events(report: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of the model in a report, under flat names: `lena/gain`, `lena/noise_scale`, and `lena/warmup`.

    `lena/warmup` is the mean of the layers' warm-up factors. An infinite number is left out.
    """
    parts = report["layers"]
    warmup = sum(layer["warmup"] for layer in parts.values()) / max(len(parts), 1)
    return _finite({"lena/gain": report["gain"], "lena/noise_scale": report["noise_scale"], "lena/warmup": warmup})


def noise_events(report: Mapping[str, Any], beside_lena: bool = False) -> dict[str, float]:
    """The numbers of the model in the report of a watch, under the names that LENA has for the same: `lena/gain`,
    `lena/noise_scale`; and `lena/noise_scale_low`, `…_high`, `…_samples`, `…_tokens`, `lena/efficiency`.

    `beside_lena`: without the first two, which a LENA writes itself.
    """
    names = advice.EVENTS[1:] if beside_lena else ("gain", *advice.EVENTS)
    return _finite({f"lena/{name}": report[name] for name in names if report["estimator"] and report[name] is not None})


def layer_events(report: Mapping[str, Any]) -> dict[str, float]:
    """The same of every layer: `lena/layers/NAME/gain`, `…/noise_scale`, `…/warmup`. An infinite number is left out."""
    keys = ("gain", "noise_scale", "warmup")
    return _finite(
        {
            f"lena/layers/{name}/{key}": layer[key]
            for name, layer in report["layers"].items()
            for key in keys
            if key in layer
        }
    )


def _finite(found: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in found.items() if math.isfinite(value)}


def find_lena(source: Any) -> LENA | None:
    """The LENA inside an engine, Trainer or wrapper. None if there is none."""
    return next((thing for thing in _inside(source) if isinstance(thing, LENA)), None)


def find_watch(source: Any) -> Watch | None:
    """The watch of an engine, Trainer, wrapper or optimizer. None if there is none."""
    found = (thing if isinstance(thing, Watch) else getattr(thing, "ds_lena_watch", None) for thing in _inside(source))
    return next((watch for watch in found if isinstance(watch, Watch)), None)


def _inside(source: Any) -> Iterator[Any]:
    seen: set[int] = set()
    waiting = [source]
    while waiting:
        thing = waiting.pop(0)
        if thing is None or id(thing) in seen:
            continue
        seen.add(id(thing))
        yield thing
        waiting += [getattr(thing, name, None) for name in _INSIDE]
