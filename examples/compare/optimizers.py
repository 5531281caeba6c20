"""From a method's settings to optimizers, their learning rates over the run, and the batches.

Settings of all methods: `lr`, `beta2`, `weight_decay` (of matrices alone), `clip` (of the gradient norm),
`warmup_fraction` (a linear warm-up, as a share of the run), `lr_power` (the learning rate is `lr` x n ^ `lr_power`),
`full_batch_at` (a batch that grows as planned, see `windows`), `growth_factor`, `update_price` or `norm_test` (one that
follows the noise, from 2 micro-batches to n, see `growing.py`), `batch_lr_power` (the learning rate of an update is
multiplied by its micro-batches ^ `batch_lr_power`). For a LENA, all others are keys of its JSON entry, and the warm-up
is its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import schedulefree
import torch
from torch import nn
from torch.optim import Optimizer

import ds_lena
from ds_lena.growing import Growing

from ..common.errors import InputError
from . import muon
from .growing import SMALLEST, NormTest, follow
from .preconditioned import precondition

Settings = Mapping[str, Any]
FOLLOWS_NOISE = {"growth_factor", "update_price", "norm_test"}
GROWS = {"full_batch_at"} | FOLLOWS_NOISE
_SHARED = {"lr", "lr_power", "beta2", "weight_decay", "clip", "warmup_fraction", "batch_lr_power"} | GROWS
_NO_KEYS = _SHARED - {"lr", "weight_decay", "warmup_fraction"} | {"muon_lr"}
"""Settings that are no keys of LENA's entry."""
_FINAL_LR = 0.1
"""The cosine ends at this share of the peak."""


@dataclass
class Contestant:
    """What trains a model: its optimizers, and how the run goes.

    `growing`: says the `accumulation` of the next update, where the batch follows the noise.
    """

    optimizers: list[Optimizer]
    warmup_fraction: float = 0.0
    decays: bool = True
    growing: Growing | NormTest | None = None
    peaks: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.peaks = [group["lr"] for group in self._groups()]

    def set_lr(self, began: float, ended: float, scale: float = 1.0) -> None:
        """Set the learning rates of an update that leads from share `began` of the run to share `ended`."""
        factor = scale
        if self.decays:
            factor *= _FINAL_LR + (1 - _FINAL_LR) * (1 + math.cos(math.pi * began)) / 2
        if ended < self.warmup_fraction:
            factor *= ended / self.warmup_fraction
        for group, peak in zip(self._groups(), self.peaks, strict=True):
            group["lr"] = peak * factor

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def mode(self, training: bool) -> None:
        """Schedule-free optimizers hold two sets of weights."""
        for optimizer in self.optimizers:
            if isinstance(optimizer, schedulefree.AdamWScheduleFree):
                (optimizer.train if training else optimizer.eval)()

    def _groups(self) -> Iterable[dict[str, Any]]:
        return (group for optimizer in self.optimizers for group in optimizer.param_groups)


def check(optimizer: str, settings: Settings) -> None:
    """Raise InputError for an optimizer that does not exist, or settings that it does not take.

    A setting that nothing reads would change nothing, in silence.
    """
    if optimizer not in OPTIMIZERS:
        raise InputError(f"no optimizer is called {optimizer}; there are {', '.join(OPTIMIZERS)}")
    allowed = set(_SHARED)
    if "muon" in optimizer:
        allowed.add("muon_lr")
        if "muon_lr" not in settings:
            raise InputError("muon_lr is missing, in its settings or its search")
    if "lena" in optimizer:
        allowed |= settings.keys() - _NO_KEYS
        try:
            _lena_of([nn.Parameter(torch.zeros(1))], {"beta2": 0.9, **settings}, nn.Module(), updates=1)
        except (ds_lena.ConfigError, TypeError) as error:
            raise InputError(str(error)) from error
    if len(GROWS & settings.keys()) > 1:
        raise InputError("a batch grows by one of full_batch_at, growth_factor, update_price and norm_test")
    for key in {"growth_factor", "update_price"} & settings.keys():
        try:
            ds_lena.BatchGrowth(settings[key], SMALLEST, SMALLEST)
        except ds_lena.ConfigError as error:
            raise InputError(str(error)) from error
    if "norm_test" in settings and ("lena" in optimizer or not 0 < settings["norm_test"] < 1):
        raise InputError("norm_test is between 0 and 1, and not for a LENA, whose averages are its own")
    if unknown := settings.keys() - allowed:
        raise InputError(f"no setting is called {', '.join(unknown)}; there are {', '.join(sorted(allowed))}")


def build(optimizer: str, settings: Settings, model: nn.Module, n: int, updates: int) -> Contestant:
    """`optimizer` is a name of `OPTIMIZERS`; the run has `updates` updates of `n` micro-batches.

    Where the batch follows the noise, n is the largest, and `updates` is what the run would have at the smallest.
    """
    lr = settings["lr"] * n ** settings.get("lr_power", 0)
    scaled = {"beta2": 0.999, "weight_decay": 0.0, **settings, "lr": lr}
    found = OPTIMIZERS[optimizer](scaled, model, updates)
    if FOLLOWS_NOISE & settings.keys():
        if len(found.optimizers) > 1:  # one that has all parameters, and moves none, so that all are measured
            found = replace(found, optimizers=[*found.optimizers, torch.optim.SGD(model.parameters(), lr=0.0)])
        found.growing = follow(found.optimizers[-1], settings, model, n)
    return found


def windows(settings: Settings, n: int, micro_batches: int) -> list[int]:
    """Micro-batches of every update of a run, as planned. With `full_batch_at`, the batch grows to n as powers of two.

    Batch warm-up, Merrill et al., https://arxiv.org/abs/2505.23971: the batch follows the critical one, which grows
    while the loss falls; here as the tokens seen do, until the share `full_batch_at` of the run. A batch that follows
    the noise has the plan of its first updates.
    """
    if FOLLOWS_NOISE & settings.keys():
        n = SMALLEST
    found: list[int] = []
    done = 0
    while done < micro_batches:
        window = n
        if "full_batch_at" in settings:
            grown = n * (done + 1) / (settings["full_batch_at"] * micro_batches)
            window = min(n, max(1, 2 ** math.floor(math.log2(grown))))
        found.append(min(window, micro_batches - done))
        done += found[-1]
    return found


def _adamw(settings: Settings, model: nn.Module, updates: int) -> Contestant:
    return Contestant([_adamw_of(model.named_parameters(), settings)], settings.get("warmup_fraction", 0.0))


def _adamw_of(named: Iterable[tuple[str, nn.Parameter]], settings: Settings) -> Optimizer:
    return torch.optim.AdamW(_groups(named, settings), settings["lr"], (0.9, settings["beta2"]), fused=True)


def _sgd(settings: Settings, model: nn.Module, updates: int) -> Contestant:
    sgd = torch.optim.SGD(_groups(model.named_parameters(), settings), settings["lr"], momentum=0.9)
    return Contestant([sgd], settings.get("warmup_fraction", 0.0))


def _schedule_free(settings: Settings, model: nn.Module, updates: int) -> Contestant:
    groups, betas = _groups(model.named_parameters(), settings), (0.9, settings["beta2"])
    warmup = round(settings.get("warmup_fraction", 0.0) * updates)
    optimizer = schedulefree.AdamWScheduleFree(groups, settings["lr"], betas, warmup_steps=warmup)
    return Contestant([optimizer], decays=False)


def _lena(settings: Settings, model: nn.Module, updates: int) -> Contestant:
    return Contestant([_lena_of(model.named_parameters(), settings, model, updates)])


def _lena_of(parameters: Iterable[Any], settings: Settings, model: nn.Module, updates: int) -> ds_lena.LENA:
    keys = {key: value for key, value in settings.items() if key not in _NO_KEYS}
    if settings.get("base", "adamw") in ("adamw", "lamb"):
        keys["betas"] = (0.9, settings["beta2"])
    plain = [name for name, parameter in model.named_parameters() if parameter.ndim < 2]
    return ds_lena.LENA(parameters, **keys, no_decay=plain, total_steps=updates)


def _preconditioned_lena(settings: Settings, model: nn.Module, updates: int) -> Contestant:
    contestant = _lena(settings, model, updates)
    precondition(contestant.optimizers[0], settings["beta2"])
    return contestant


def _muon(settings: Settings, model: nn.Module, updates: int) -> Contestant:
    """With `muon_lr` for its matrices; AdamW on the rest."""
    hidden, rest = muon.split(model)
    optimizers = [muon.build(hidden, settings), _adamw_of(rest.items(), settings)]
    return Contestant(optimizers, settings.get("warmup_fraction", 0.0))


def _lena_muon(settings: Settings, model: nn.Module, updates: int) -> Contestant:
    """LENA measures all tensors, moves those that are not Muon's, and scales Muon's learning rates for the others."""
    hidden, rest = muon.split(model)
    groups = [{"params": list(rest.items())}, {"params": list(hidden.items()), "lr": 0.0}]
    lena = _lena_of(groups, settings, model, updates)
    rule = muon.build(hidden, settings)
    muon.scale(rule, lena)
    return Contestant([lena, rule])


def _groups(named: Iterable[tuple[str, nn.Parameter]], settings: Settings) -> list[dict[str, Any]]:
    """Two groups: matrices, and what has fewer dimensions, without weight decay."""
    parameters = [parameter for _, parameter in named]
    matrices = {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings["weight_decay"]}
    return [matrices, {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]


OPTIMIZERS: dict[str, Callable[[Settings, nn.Module, int], Contestant]] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "lena": _lena,
    "preconditioned-lena": _preconditioned_lena,
    "schedule-free": _schedule_free,
    "muon": _muon,
    "lena-muon": _lena_muon,
}
