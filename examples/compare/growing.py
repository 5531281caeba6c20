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


def follow(optimizer: Optimizer, settings: Mapping[str, Any], model: nn.Module, largest: int) -> Growing | NormTest:
    """What says the `accumulation` of each update. `optimizer` has all parameters of the model.

    All else is as it comes: a decision every 10 updates, from an average over 1,000 micro-batches.
    """
    if "norm_test" in settings:
        return NormTest(ds_lena.watch(model, optimizer, smoothing=0.0), settings["norm_test"], largest)
    if "update_price" in settings:
        growth = ds_lena.BatchGrowth(math.sqrt(settings["update_price"]), SMALLEST, largest, power=0.5)
    else:
        growth = ds_lena.BatchGrowth(settings["growth_factor"], SMALLEST, largest)
    return ds_lena.grow(model, growth, optimizer=optimizer)
