"""The optimizers that are compared, by the name that the tables show, all with the same hyperparameters."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import ds_lena

ADAM: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
MOMENTUM: dict[str, Any] = {"lr": 1e-5, "momentum": 0.9, "weight_decay": 0.01}
KEYS = {"adamw": ADAM, "lamb": ADAM, "lars": MOMENTUM, "sgd": MOMENTUM}

REFERENCE = "AdamW, fused"
LENA = {base: f"LENA ({base})" for base in KEYS}
STOCK = {"adamw": REFERENCE, "lamb": "timm Lamb", "lars": "timm Lars", "sgd": "SGD, fused"}
"""By base rule: LENA, and the optimizer that moves parameters by the same rule."""


class NotAvailable(Exception):
    """Why an optimizer cannot be measured here."""


def make(name: str, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """The optimizer of this name.

    Raises:
        NotAvailable: it is not installed, cannot be built, or does not run on the parameters' device.
    """
    parameters = list(parameters)
    try:
        return MAKERS[name](parameters)
    except (ImportError, ds_lena.LenaError) as error:
        raise NotAvailable(str(error)) from error


def available(names: Iterable[str], device: torch.device) -> tuple[list[str], dict[str, str]]:
    """Which of them can be made for parameters on this device, and of the others why not.

    It tries them on one number, so that what has to be compiled is compiled.
    """
    found, left_out = [], {}
    for name in names:
        try:
            make(name, [torch.nn.Parameter(torch.zeros(1, device=device))])
            found.append(name)
        except NotAvailable as reason:
            left_out[name] = str(reason)
    return found, left_out


def _lena(base: str, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    return ds_lena.LENA(parameters, base=base, total_steps=1_000_000, **KEYS[base])


def _cpu_adam(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    if parameters[0].device.type != "cpu":
        raise NotAvailable("for parameters on the CPU only")
    return _from_deepspeed("DeepSpeedCPUAdam", parameters, adamw_mode=True)


def _fused_adam(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    if parameters[0].device.type == "cpu":
        raise NotAvailable("for parameters on a GPU only")
    return _from_deepspeed("FusedAdam", parameters, adam_w_mode=True)


def _from_deepspeed(name: str, parameters: Sequence[Tensor], **keys: Any) -> torch.optim.Optimizer:
    """An optimizer that DeepSpeed compiles when it is first made."""
    try:
        return getattr(importlib.import_module("deepspeed.ops.adam"), name)(parameters, **keys, **ADAM)
    except Exception as error:  # whatever a compiler, ninja or CUDA may have to say
        raise NotAvailable(f"cannot be built: {error}") from error


def _timm_lamb(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    # Without its clipping by the norm of all gradients, which the others do not do.
    return timm_module("lamb").Lamb(parameters, max_grad_norm=None, always_adapt=True, **ADAM)


def _timm_lars(parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    return timm_module("lars").Lars(parameters, always_adapt=True, **MOMENTUM)


def timm_module(name: str) -> ModuleType:
    """One module of timm.optim. Importing timm itself needs torchvision, which optimizers do not."""
    found = importlib.util.find_spec("timm")  # looks, and runs nothing
    if found is None or found.submodule_search_locations is None:
        raise NotAvailable("timm is not installed")
    if "timm" not in sys.modules:
        top, optim = ModuleType("timm"), ModuleType("timm.optim")  # in place of the two __init__.py
        top.__path__ = list(found.submodule_search_locations)
        optim.__path__ = [f"{path}/optim" for path in top.__path__]
        top.__spec__ = found
        sys.modules |= {"timm": top, "timm.optim": optim}
    return importlib.import_module(f"timm.optim.{name}")


MAKERS: dict[str, Callable[[Sequence[Tensor]], torch.optim.Optimizer]] = {
    REFERENCE: partial(torch.optim.AdamW, fused=True, **ADAM),
    "AdamW, foreach": partial(torch.optim.AdamW, foreach=True, **ADAM),
    "DeepSpeedCPUAdam": _cpu_adam,
    "DeepSpeed FusedAdam": _fused_adam,
    "timm Lamb": _timm_lamb,
    "timm Lars": _timm_lars,
    "SGD, fused": partial(torch.optim.SGD, fused=True, **MOMENTUM),
    **{name: partial(_lena, base) for base, name in LENA.items()},
}
