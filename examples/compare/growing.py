"""Batches that follow the noise while a run goes on: by the noise scale or its root, or by the norm test."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

import ds_lena
from ds_lena.growing import Growing
from ds_lena.watching import Watch

SMALLEST = 2
"""Micro-batches of the first updates. One alone shows no noise."""


class NormTest:
    """Growth by the norm test of Lau et al., https://arxiv.org/abs/2412.21124.

    Noise s2 and averaged gradient g are those of the last update alone, of n micro-batches. The test is
    s2 / n <= eta^2 |g|^2. Where it fails, the next update has s2 / (eta^2 |g|^2) micro-batches, rounded up; a batch
    never shrinks. |g|^2 is m2 + s2 / n. So a batch passes if it is at least (1 - eta^2) / eta^2 noise scales.
    """

    def __init__(self, watch: Watch, eta: float, largest: int) -> None:
        self.accumulation = SMALLEST
        self._watch, self._eta, self._largest = watch, eta, largest
        watch.after_update.append(self._decide)

    def _decide(self) -> None:
        report = self._watch.report()
        square = report["signal"] + report["noise"] / report["n"]
        wanted = report["noise"] / (self._eta**2 * square)
        if math.isfinite(wanted):  # a last update of one micro-batch tells nothing
            self.accumulation = max(self.accumulation, min(math.ceil(wanted), self._largest))


class PricedGrowth(ds_lena.BatchGrowth):
    """A batch of factor x the square root of the noise scale.

    With a noise scale B, an update of n micro-batches is worth 1 / (1 + B / n) of a noiseless one (McCandlish et al.,
    https://arxiv.org/abs/1812.06162). So noiseless progress costs B + n micro-batches and (1 + B / n) updates. If an
    update costs as much as r micro-batches beside its own, the sum is least at n = sqrt(r B).
    """

    def next(self, now: int, noise_scale: float, replicas: int, done: int = 0, lowest: int = 1) -> int:
        root = math.sqrt(noise_scale) if noise_scale > 0 else noise_scale
        return super().next(now, root, replicas, done, lowest)


def follow(optimizer: Optimizer, settings: Mapping[str, Any], model: nn.Module, largest: int) -> Growing | NormTest:
    """What says the `accumulation` of each update. `optimizer` has all parameters of the model.

    All else is as it comes: a decision every 10 updates, from an average over 1,000 micro-batches.
    """
    if "norm_test" in settings:
        return NormTest(ds_lena.watch(model, optimizer, smoothing=0.0), settings["norm_test"], largest)
    if "update_price" in settings:
        growth: ds_lena.BatchGrowth = PricedGrowth(math.sqrt(settings["update_price"]), SMALLEST, largest)
    else:
        growth = ds_lena.BatchGrowth(settings["growth_factor"], SMALLEST, largest)
    return ds_lena.grow(model, growth, optimizer=optimizer)
