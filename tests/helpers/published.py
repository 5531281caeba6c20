"""Published optimizers that the rules are compared with: torch's own, and LAMB and LARS as timm has them.

timm's conventions are set to those of the papers: adapted whatever the weight decay, no clipping, no epsilon in LARS.
Its Lars keeps the learning rate outside of the momentum, so the two agree for a constant one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.contestants import timm_module


def lamb(parameters: Any, weight_decay: float, **options: Any) -> torch.optim.Optimizer:
    make: Callable[..., torch.optim.Optimizer] = timm_module("lamb").Lamb
    return make(parameters, weight_decay=weight_decay, max_grad_norm=None, always_adapt=True, **options)


def lars(parameters: Any, weight_decay: float, **options: Any) -> torch.optim.Optimizer:
    make: Callable[..., torch.optim.Optimizer] = timm_module("lars").Lars
    return make(parameters, weight_decay=weight_decay, eps=0.0, always_adapt=True, **options)
