"""`variant: "authors-code"`: what the authors' published code computes, for comparison with published work.

Source: https://github.com/yy-ko/lena-www22 at a4c121c. It differs from `algorithm.advance` in four ways. It averages A
and B, from zero and without debiasing. Its epsilon is absolute. The warm-up factor comes from S *before* this update.
A layer whose gain reaches n adds the whole model's gain to S instead of its own. With `layer: "tensor"` it is the
authors' LENA, and with `layer: "model"` their AdaScale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import LenaConfig
from ..grad_stats.measurement import Measurement
from .algorithm import Clock, LayerState, noise_and_signal

EPSILON = 1e-6


def advance(state: LayerState, measured: Measurement, clock: Clock, config: LenaConfig) -> LayerState:
    """One update as the authors' code does it. Shapes as in `algorithm.advance`; `clock.planned` is T x n."""
    w = measured.n / 1000
    new = torch.stack((measured.mean_square, measured.square_of_mean))
    finite = measured.finite
    averages = torch.where(finite, (1 - w) * state.averages + w * new, state.averages)
    raw, model = _ratio(averages), _ratio(averages.sum(dim=1))
    gain = torch.where(finite, torch.minimum(raw, measured.n), state.gain)
    counted = torch.where(raw >= measured.n, model, raw)
    warmup = torch.ones_like(gain)
    if config.warmup != "none":
        warmup = (state.progress / (config.warmup_fraction * clock.planned)).clamp(max=1)
    return LayerState(
        averages=averages,
        weight=torch.where(finite, torch.ones_like(state.weight), state.weight),
        progress=torch.where(finite, state.progress + counted, state.progress),
        gain=gain,
        warmup=torch.where(finite, warmup, state.warmup),
        capped=state.capped,
    )


def _ratio(averages: Tensor) -> Tensor:
    return (averages[0] + EPSILON) / (averages[1] + EPSILON)


def averaged_noise_and_signal(averages: Tensor, n: Tensor) -> Tensor:
    """(2, L): noise and signal from the averages of A and B, for the report."""
    return torch.stack(noise_and_signal(averages[0], averages[1], n))
