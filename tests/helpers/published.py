"""Published optimizers that the rules are compared with: torch's own, and LAMB and LARS as timm has them.

timm's conventions are set to those of the papers: adapted whatever the weight decay, no clipping, no epsilon in LARS.
Its Lars keeps the learning rate outside of the momentum, so the two agree for a constant one.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch


def _from_timm(module: str) -> Any:
    """A module of `timm.optim` without what the packages around it import: torchvision, for one."""
    if "timm" not in sys.modules:
        found = importlib.util.find_spec("timm")
        assert found is not None and found.submodule_search_locations is not None, "timm is not installed"
        (root,) = found.submodule_search_locations
        for name, folder in (("timm", root), ("timm.optim", f"{root}/optim")):
            sys.modules[name] = package = ModuleType(name)
            package.__path__ = [folder]
        sys.modules["timm"].__spec__ = found  # other libraries look whether timm is there
    return importlib.import_module(f"timm.optim.{module}")


def lamb(parameters: Any, weight_decay: float, **options: Any) -> torch.optim.Optimizer:
    make: Callable[..., torch.optim.Optimizer] = _from_timm("lamb").Lamb
    return make(parameters, weight_decay=weight_decay, max_grad_norm=None, always_adapt=True, **options)


def lars(parameters: Any, weight_decay: float, **options: Any) -> torch.optim.Optimizer:
    make: Callable[..., torch.optim.Optimizer] = _from_timm("lars").Lars
    return make(parameters, weight_decay=weight_decay, eps=0.0, always_adapt=True, **options)
