"""The method on one page: pure functions on vectors with one entry per layer. No distributed code, no DeepSpeed.

Source: Ko, Lee, Kim, "Not All Layers Are Equal: A Layer-Wise Adaptive Approach Toward Large-Scale DNN Training",
WWW 2022, https://doi.org/10.1145/3485447.3511989 (equations 4-8, Algorithm 1). Ours are: the averages of noise and
signal, where the paper averages A and B; their debiasing; the bound by the model's gain; the warm-up cap.

| symbol  | shape | here                | meaning                                                                     |
|---------|-------|---------------------|-----------------------------------------------------------------------------|
| n       | ()    | `n`                 | micro-batches averaged in this update                                        |
| k       |       | `k`                 | base batch, in micro-batches: the batch that the learning rate was tuned for |
| R       | ()    | `largest_gain`      | max(n / k, 1)                                                                |
| A       | (L,)  | `mean_square`       | mean of the squared norms of the micro-gradients                             |
| B       | (L,)  | `square_of_mean`    | squared norm of the averaged gradient, B <= A                                |
| s2, m2  | (L,)  | `noise`, `signal`   | s2 = n/(n-1) (A - B), m2 = B - s2/n: E[A] = s2 + m2, E[B] = s2/n + m2        |
| W       | (L,)  | `weight`            | weight of all values so far in the moving averages; 1 once they have no bias |
| r       | (L,)  | `gain`              | in [1, R]                                                                    |
| S       | (L,)  | `progress`          | training state, in base-batch iterations                                     |
| P, H    | ()    | `done`, `planned`   | base-batch iterations of the run: so far, and planned for the whole run      |
| f       | (L,)  | `warmup`            | warm-up factor in [0, 1]                                                     |

Every quantity is a float64 tensor on the model's device, and a scalar is a 0-dim tensor, so an update does not wait for
the device. Squared norms are in the units of the squared gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ..config import LenaConfig
from ..grad_stats.measurement import Measurement

RELATIVE_FLOOR = 1e-8
"""e of the gain, as a share of the model's mean squared gradient per element. A layer below it shows rounding only."""


@dataclass(frozen=True)
class Clock:
    """Base-batch iterations of the run, () each: `done` P includes this update, `planned` H."""

    done: Tensor
    planned: Tensor


@dataclass(frozen=True)
class LayerState:
    """All that LENA remembers of the layers, O(L). Checkpoints hold it by layer name.

    `averages` (2, L): moving averages of noise and signal, not debiased; those of A and B in the authors' variant.
    `weight` (L,) W. `progress` (L,) S. `gain` (L,) r. `warmup` (L,) f.
    `capped` (L,) bool: the cap's term of the warm-up is the larger one. It stays as it is once the warm-up has ended.
    """

    averages: Tensor
    weight: Tensor
    progress: Tensor
    gain: Tensor
    warmup: Tensor
    capped: Tensor

    @classmethod
    def start(cls, layers: int, warmup: float, device: torch.device | str = "cpu") -> LayerState:
        """The state before the first update: no averages, gains 1. `warmup`: the warm-up factors, 1 without a warm-up,
        else 0.
        """

        def full(value: float) -> Tensor:
            return torch.full((layers,), value, dtype=torch.float64, device=device)

        return cls(
            averages=full(0.0).repeat(2, 1),
            weight=full(0.0),
            progress=full(0.0),
            gain=full(1.0),
            warmup=full(warmup),
            capped=torch.zeros(layers, dtype=torch.bool, device=device),
        )


def noise_and_signal(mean_square: Tensor, square_of_mean: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """s2 = n/(n-1) (A - B) and m2 = B - s2/n, (L,) each, for n > 1.

    n = 1 gives finite numbers without a meaning, which the caller masks.
    """
    n = n.clamp(min=2)
    noise = n / (n - 1) * (mean_square - square_of_mean)
    return noise, square_of_mean - noise / n


def new_value_weight(n: Tensor, smoothing: float | None) -> Tensor:
    """Weight w of the new value in the moving averages: 1 - smoothing, or the paper's min(n/1000, 1) for None."""
    if smoothing is None:
        return (n / 1000).clamp(max=1)
    return torch.full_like(n, 1 - smoothing)


class Averages(Protocol):
    """Moving averages (2, L) of noise and signal, and their weights W (L,)."""

    @property
    def averages(self) -> Tensor: ...

    @property
    def weight(self) -> Tensor: ...


def averaged(state: Averages, measured: Measurement, smoothing: float | None) -> tuple[Tensor, Tensor]:
    """Moving averages (2, L) and their weights W (L,) after this update. A layer without a new value keeps both."""
    new = torch.stack(noise_and_signal(measured.mean_square, measured.square_of_mean, measured.n))
    w = new_value_weight(measured.n, smoothing)
    has_value = measured.has_noise
    averages = torch.where(has_value, (1 - w) * state.averages + w * new, state.averages)
    weight = torch.where(has_value, (1 - w) * state.weight + w, state.weight)
    return averages, weight


def debiased(averages: Tensor, weight: Tensor) -> Tensor:
    """(2, L): noise and signal, as averages / W. 0 where W = 0."""
    return torch.where(weight > 0, averages / weight.clamp(min=torch.finfo(weight.dtype).tiny), 0.0)


def largest_gain(n: Tensor, k: float) -> Tensor:
    """R = max(n/k, 1), ()."""
    return (n / k).clamp(min=1)


def gain_ratio(noise: Tensor, signal: Tensor, floor: Tensor | float, n: Tensor, k: float) -> Tensor:
    """(s2/k + m2' + e) / (s2/n + m2' + e) with m2' = max(m2, 0), clamped to [1, R]. 1 if the denominator is not > 0."""
    signal = signal.clamp(min=0)
    denominator = noise / n + signal + floor
    positive = denominator > 0
    ratio = (noise / k + signal + floor) / torch.where(positive, denominator, 1.0)
    bounded = torch.minimum(ratio.clamp(min=1), largest_gain(n, k))
    return torch.where(positive & (n > 1), bounded, 1.0)


def model_noise_and_signal(noise: Tensor, signal: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of s2 and of m2 over the layers that have averages, () each. The sum of m2 may be negative."""
    known = weight > 0
    return torch.where(known, noise, 0.0).sum(), torch.where(known, signal, 0.0).sum()


def model_gain(noise: Tensor, signal: Tensor, weight: Tensor, n: Tensor, k: float) -> Tensor:
    """r_model, (): the gain of all layers taken as one layer, as in AdaScale."""
    return gain_ratio(*model_noise_and_signal(noise, signal, weight), 0.0, n, k)


def layer_gain(
    noise: Tensor, signal: Tensor, weight: Tensor, numel: Tensor, n: Tensor, k: float, max_relative_gain: float | None
) -> Tensor:
    """r of each layer, (L,), from debiased noise and signal (equation 5 of the paper, with our floor and bound).

    `numel` (L,): elements of each layer. A layer without averages has gain 1.
    """
    known = weight > 0
    all_noise, all_signal = model_noise_and_signal(noise, signal, weight)
    all_numel = torch.where(known, numel, 0.0).sum().clamp(min=1)
    floor = RELATIVE_FLOOR * numel * (all_noise + all_signal) / all_numel
    gain = gain_ratio(noise, signal, floor, n, k)
    if max_relative_gain is not None:
        bound = (max_relative_gain * model_gain(noise, signal, weight, n, k)).clamp(min=1)
        gain = torch.minimum(gain, bound)
    return torch.where(known, gain, 1.0)


def warmup_factor(progress: Tensor, clock: Clock, config: LenaConfig) -> tuple[Tensor, Tensor]:
    """f (L,) before its bound of 1, and (L,) bool: whether the cap's term is the larger one (equations 7 and 8)."""
    none = torch.zeros_like(progress, dtype=torch.bool)
    if config.warmup == "none":
        return torch.ones_like(progress), none
    end = config.warmup_fraction * clock.planned
    if config.warmup == "fixed" or config.scaling != "gain":
        return (clock.done / end).expand_as(progress), none
    by_state = progress / end
    if config.warmup_cap is None:
        return by_state, none
    by_cap = clock.done / (config.warmup_cap * clock.planned)
    return torch.maximum(by_state, by_cap), by_cap > by_state


def advance(
    state: LayerState, measured: Measurement, clock: Clock, k: float, numel: Tensor, config: LenaConfig
) -> LayerState:
    """The state after one update of the method (Algorithm 1). `step_factor` gives the factors from it.

    A layer without a gradient keeps averages, W and S. A layer with a statistic that is not finite keeps everything.
    """
    averages, weight = averaged(state, measured, config.smoothing)
    noise, signal = debiased(averages, weight)
    gain = _scaling_gain(noise, signal, weight, numel, measured.n, k, config)
    progress = torch.where(measured.seen, state.progress + gain, state.progress)
    warmup, capped = warmup_factor(progress, clock, config)
    ended = state.warmup >= 1
    warmup = torch.where(ended, 1.0, warmup.clamp(max=1))
    capped = torch.where(ended, state.capped, capped)
    finite = measured.finite
    return LayerState(
        averages=averages,
        weight=weight,
        progress=progress,
        gain=torch.where(finite, gain, state.gain),
        warmup=torch.where(finite, warmup, state.warmup),
        capped=torch.where(finite, capped, state.capped),
    )


def _scaling_gain(
    noise: Tensor, signal: Tensor, weight: Tensor, numel: Tensor, n: Tensor, k: float, config: LenaConfig
) -> Tensor:
    if config.scaling == "gain":
        return layer_gain(noise, signal, weight, numel, n, k, config.max_relative_gain)
    largest = largest_gain(n, k)
    fixed = {"linear": largest, "sqrt": largest.sqrt(), "none": torch.ones_like(largest)}
    return fixed[config.scaling].expand_as(noise)


def step_factor(state: LayerState, config: LenaConfig) -> Tensor:
    """(L,): the factor of each layer's learning rate, min(r^p, max_factor) x f. p applies to scaling "gain" only."""
    gain = state.gain**config.gain_power if config.scaling == "gain" else state.gain
    return (gain if config.max_factor is None else gain.clamp(max=config.max_factor)) * state.warmup


S = TypeVar("S", bound=Any)


def rescale_noise(state: S, ratio: float) -> S:
    """The state for another micro-batch size: its averaged noise x ratio, with ratio = old size / new size."""
    scale = torch.tensor([[ratio], [1.0]], dtype=state.averages.dtype, device=state.averages.device)
    return replace(state, averages=state.averages * scale)
