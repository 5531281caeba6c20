"""LENA written a second time: plain Python floats, one layer at a time, nothing shared with the library.

Slow and literal on purpose; the library is compared with this file, so it imports nothing from it. Only the numbers
(A, B, n) come in and only factors go out: gradients and weights are the business of `reference.py`.

    n       micro-gradients averaged in this update          k    base batch, in micro-batches
    R       max(n/k, 1), the largest gain                    T    planned updates
    A, B    mean squared norm of a layer's micro-gradients, squared norm of their mean
    s2, m2  noise and signal: s2 = n/(n-1) (A-B), m2 = B - s2/n
    r, f    gain in [1, R], warm-up factor in [0, 1]
    S, P    sum of r over updates (per layer), sum of R;     H    P as planned for the whole run
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

Numbers = Mapping[str, float]

KEYS: dict[str, Any] = {
    "lr": 1e-3,
    "base": "adamw",
    "weight_decay": None,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "momentum": 0.9,
    "nesterov": False,
    "trust_coefficient": None,
    "trust_clip": None,
    "layer": "tensor",
    "scaling": "gain",
    "gain_power": None,
    "max_relative_gain": 4.0,
    "max_factor": None,
    "smoothing": None,
    "base_batch_size": None,
    "micro_batch_size": None,  # plain PyTorch only; the reference is told the size of every window
    "warmup": "layer",
    "warmup_fraction": 0.05,
    "warmup_cap": 0.25,
    "total_steps": None,
    "exclude": [],
    "no_decay": [],
}


def complete(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The keys with the defaults of those left out."""
    unknown = set(keys) - set(KEYS)
    if unknown:
        raise ValueError(f"the oracle knows no keys {sorted(unknown)}")
    full = KEYS | dict(keys)
    if full["gain_power"] is None:
        full["gain_power"] = 0.85 if full["base"] in ("adamw", "lamb") else 1.0
    if "warmup_cap" not in keys:
        full["warmup_cap"] = max(full["warmup_cap"], full["warmup_fraction"])
    return full


def layer_of(name: str, layer: str) -> str:
    """The layer that the parameter `name` belongs to."""
    if layer == "model":
        return "model"
    if layer == "tensor":
        return name
    parts = name.split(".")
    if layer == "block":
        for end, part in enumerate(parts, start=1):
            if part.isdigit():
                return ".".join(parts[:end])
    return ".".join(parts[:-1]) or "root"


@dataclass
class Layer:
    """What one layer remembers from update to update, and its last results."""

    size: int
    noise_sum: float = 0.0
    signal_sum: float = 0.0
    weight: float = 0.0
    state: float = 0.0
    ended: bool = False
    capped: bool = False
    gain: float = 1.0
    warmup: float = 0.0

    @property
    def noise(self) -> float:
        return self.noise_sum / self.weight if self.weight else 0.0

    @property
    def signal(self) -> float:
        return self.signal_sum / self.weight if self.weight else 0.0


@dataclass
class Oracle:
    """The method's state. `sizes` holds the number of elements of every layer. `grows`: H is that of the first n."""

    sizes: Mapping[str, int]
    keys: Mapping[str, Any]
    grows: bool = False
    layers: dict[str, Layer] = field(init=False)
    t: int = 0
    n: int = 0
    k: float = 1.0
    progress: float = 0.0
    planned: float | None = None
    planned_for: int = 0  # n
    batch_size: int | None = None
    base: float | None = None  # in samples: one micro-batch of the first update, unless it is given
    skipped: int = 0
    nonfinite: int = 0

    def __post_init__(self) -> None:
        self.layers = {name: Layer(size) for name, size in self.sizes.items()}
        self.base = self.keys["base_batch_size"]

    def skip(self) -> None:
        """An update that was not applied."""
        self.skipped += 1

    def update(self, a: Numbers, b: Numbers, n: int, batch_size: int, alone: Collection[str] = ()) -> dict[str, float]:
        """One applied update of `n` micro-gradients of `batch_size` samples: the lr factor of every layer.

        `alone`: layers with one micro-gradient of their own.
        """
        self.t, self.n = self.t + 1, n
        self._follow_batch_size(batch_size)
        largest = self._largest_gain()
        if self.planned is None and self.keys["warmup"] != "none":
            self.planned = self.keys["total_steps"] * largest
            self.planned_for = n
        elif (
            self.t == 2 and n > self.planned_for and self.planned is not None and not self.grows
        ):  # the first window was a short one
            self.planned = self.progress + (self.keys["total_steps"] - 1) * largest
        self.progress += largest

        finite = {name for name in self.layers if math.isfinite(a[name]) and math.isfinite(b[name])}
        self.nonfinite += len(self.layers) - len(finite)
        seen = {name for name in finite if a[name] > 0}
        for name in seen:
            if name not in alone:
                self._average(self.layers[name], a[name], b[name])
        for name in finite:
            layer = self.layers[name]
            layer.gain = self._gain(layer)
            if name in seen:
                layer.state += layer.gain
            self._warm_up(layer)
        return {name: self._factor(layer) for name, layer in self.layers.items()}

    def _follow_batch_size(self, batch_size: int) -> None:
        if self.batch_size is not None:
            for layer in self.layers.values():
                layer.noise_sum *= self.batch_size / batch_size
        self.batch_size = batch_size
        if self.base is None:
            self.base = batch_size
        self.k = self.base / batch_size

    def _largest_gain(self) -> float:
        return max(self.n / self.k, 1.0)

    def _average(self, layer: Layer, a: float, b: float) -> None:
        n = self.n
        if n == 1:
            return
        noise = n / (n - 1) * (a - b)
        signal = b - noise / n
        smoothing = self.keys["smoothing"]
        new = 1 - (max(1 - n / 1000, 0.0) if smoothing is None else smoothing)
        layer.noise_sum = (1 - new) * layer.noise_sum + new * noise
        layer.signal_sum = (1 - new) * layer.signal_sum + new * signal
        layer.weight = (1 - new) * layer.weight + new

    def _measured(self) -> list[Layer]:
        return [layer for layer in self.layers.values() if layer.weight > 0]

    def _ratio(self, noise: float, signal: float, extra: float) -> float:
        """(s2/k + m2' + e) / (s2/n + m2' + e), in [1, R]."""
        signal = max(signal, 0.0)
        if self.n <= 1 or noise / self.n + signal + extra == 0:
            return 1.0
        gain = (noise / self.k + signal + extra) / (noise / self.n + signal + extra)
        return min(max(gain, 1.0), self._largest_gain())

    def _model_gain(self) -> float:
        measured = self._measured()
        return self._ratio(sum(layer.noise for layer in measured), sum(layer.signal for layer in measured), 0.0)

    def _gain(self, layer: Layer) -> float:
        largest = self._largest_gain()
        fixed = {"linear": largest, "sqrt": largest**0.5, "none": 1.0}
        if self.keys["scaling"] in fixed:
            return fixed[self.keys["scaling"]]
        if layer.weight == 0:
            return 1.0
        measured = self._measured()
        power = sum(each.noise + each.signal for each in measured)
        extra = 1e-8 * layer.size * power / sum(each.size for each in measured)
        gain = self._ratio(layer.noise, layer.signal, extra)
        if self.keys["max_relative_gain"] is not None:
            gain = min(gain, max(1.0, self.keys["max_relative_gain"] * self._model_gain()))
        return gain

    def _warm_up(self, layer: Layer) -> None:
        warmup, fraction, cap = (self.keys[key] for key in ("warmup", "warmup_fraction", "warmup_cap"))
        if warmup == "none" or layer.ended:
            layer.warmup = 1.0
            return
        assert self.planned is not None
        own, limit = layer.state / (fraction * self.planned), 0.0
        if warmup == "fixed" or self.keys["scaling"] != "gain":
            own = self.progress / (fraction * self.planned)
        elif cap is not None:
            limit = self.progress / (cap * self.planned)
        layer.capped = limit > own
        layer.warmup = min(1.0, max(own, limit))
        layer.ended = layer.warmup == 1.0

    def _factor(self, layer: Layer) -> float:
        power = self.keys["gain_power"] if self.keys["scaling"] == "gain" else 1.0
        most = self.keys["max_factor"]
        factor = layer.gain**power
        return (factor if most is None else min(factor, most)) * layer.warmup

    def report(self) -> dict[str, Any]:
        """What `ds_lena.report` must say."""
        measured = self._measured()
        return {
            "update": self.t,
            "n": self.n,
            "base": self.k,
            "skipped": self.skipped,
            "nonfinite": self.nonfinite,
            "gain": self._model_gain(),
            "noise_scale": _noise_scale(
                sum(layer.noise for layer in measured), sum(layer.signal for layer in measured)
            ),
            "layers": {
                name: {
                    "gain": layer.gain,
                    "factor": self._factor(layer),
                    "warmup": layer.warmup,
                    "state": layer.state,
                    "noise": layer.noise,
                    "signal": layer.signal,
                    "noise_scale": _noise_scale(layer.noise, layer.signal),
                    "capped": layer.capped,
                }
                for name, layer in self.layers.items()
            },
        }


def _noise_scale(noise: float, signal: float) -> float:
    return noise / signal if signal > 0 else math.inf
