"""The literal float64 reference for a model of a test, and what an engine is compared with it by."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import ds_lena
from tests.helpers.compare import weight_differences
from tests.helpers.reference import Settings, Window, train
from tests.helpers.reports import report_differences
from tests.helpers.tolerance import FP32
from tests.integrations._engines import LENA
from tests.integrations._ranks import WORLD

KEYS = {"betas": (0.9, 0.99), "eps": 1e-6}  # a larger eps, as elsewhere: Adam does not walk on rounding noise
Batches = Sequence[Sequence[tuple[Any, ...]]]
"""[rank][backward pass]: the arguments of the model."""


def differences(
    engine: Any,
    model: nn.Module,
    windows: Sequence[Batches],
    divisor: int,
    between: Callable[[nn.Module, int], None] = lambda model, update: None,
    **keys: Any,
) -> list[str]:
    """Where an engine that has trained ends away from the reference, in its last report and in its weights.

    `model`: as it was at the start. `divisor`: what every loss is divided by. `between(model, update)`: what was done
    to the model after each update. Every rank calls it.
    """
    twin = copy.deepcopy(model).double()
    groups = [{"params": [(name, p) for name, p in twin.named_parameters() if p.requires_grad]}]
    wide = [[[tuple(_wide(a) for a in batch) for batch in rank] for rank in window] for window in windows]
    told = [Window(batches, divisor, batch_size=2) for batches in wide]
    snapshots = []
    for update, snapshot in enumerate(train(twin, groups, LENA | KEYS | keys, told, Settings())):
        snapshots.append(snapshot)
        between(twin, update)
    return [
        *report_differences(ds_lena.report(engine), snapshots[-1].report, FP32),
        *weight_differences(weights(engine), snapshots, FP32),
    ]


def weights(engine: Any) -> Mapping[str, Tensor]:
    """The whole weights of what is trained. Every rank calls it."""
    import deepspeed

    found = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter):
            if parameter.requires_grad:
                found[name] = parameter.detach().clone()
    return found


def every_rank(batches: Mapping[int, Sequence[tuple[Any, ...]]] | Any) -> Batches:
    """`batches(rank)` of all ranks."""
    return [batches(rank) for rank in range(WORLD)]


def numbers(*seed: int, shape: tuple[int, ...] = (2, 8)) -> Tensor:
    """Random numbers that the seed decides, the same on every rank."""
    generator = torch.Generator().manual_seed(sum(part * 1000**place for place, part in enumerate(seed)))
    return torch.randn(shape, generator=generator)


def _wide(argument: Any) -> Any:
    return argument.double() if isinstance(argument, Tensor) and argument.is_floating_point() else argument
