"""Training in float64 in one process: the micro-batches of all ranks, the oracle's factors, torch's rules.

The base rule is `torch.optim` itself, or one of `base_rules.py`, with one param group per parameter, so that a layer's
factor is nothing but that group's lr: lr x factor acts in the update and in weight decay, and the rest is the rule's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers.base_rules import Lamb, Lars
from tests.helpers.oracle import Oracle, complete, layer_of

Gradients = dict[str, Tensor]
DECAY = {"adamw": 0.01, "lamb": 0.01, "sgd": 0.0, "lars": 0.0}
TRUST = {"lamb": 1.0, "lars": 1e-3}


@dataclass(frozen=True)
class Window:
    """What one update sees."""

    batches: Sequence[Sequence[tuple[Any, ...]]]  # [rank][backward pass]: arguments of the model
    divisor: float  # every loss is divided by it before its backward
    batch_size: int  # samples in a micro-batch
    applied: bool = True  # False: the layout skips this update


@dataclass(frozen=True)
class Settings:
    """How the layout under test trains, beyond the keys of LENA."""

    clipping: float = 0.0  # largest norm of the averaged gradient, 0 is off
    schedule: Callable[[int], float] = lambda applied: 1.0  # multiplies every group's lr; updates applied so far
    idle: str = "zeros"  # a parameter without gradient in a window is stepped with "zeros", or has its step "skipped"
    narrow: torch.dtype | None = None  # gradients come from a copy of the float64 masters in this type
    together: Sequence[Sequence[int]] = ()  # ranks whose micro-batches make one micro-gradient of an expert
    spread: str = ""  # how the names of the layers begin whose experts are shared by them
    device: str = "cpu"  # of that copy
    grows: bool = False  # the run is planned for its first window, though later ones are longer


@dataclass(frozen=True)
class Snapshot:
    """Where the run is after one update."""

    params: dict[str, Tensor]
    moved: dict[str, float]  # norm of this update, per tensor
    report: dict[str, Any]


def train(
    model: nn.Module,
    groups: Sequence[Mapping[str, Any]],
    keys: Mapping[str, Any],
    windows: Sequence[Window],
    settings: Settings,
) -> Iterator[Snapshot]:
    """Train the float64 `model` (modified in place); `groups` are param groups of (name, parameter) pairs."""
    keys = complete(keys)
    twin = model if settings.narrow is None else _narrow_copy(model, settings.narrow).to(settings.device)
    params = {name: p for group in groups for name, p in group["params"]}
    layers = {
        name: layer_of(name, keys["layer"])
        for group in groups
        for name, _ in group["params"]
        if group.get("lena", True) and not _matches(name, keys["exclude"])
    }
    sizes = _sum_by_layer(layers, {name: p.numel() for name, p in params.items()})
    oracle = Oracle(sizes, keys, grows=settings.grows)
    optimizer = _base_rule(groups, keys)
    applied = 0
    for window in windows:
        before = {name: p.detach().clone() for name, p in params.items()}
        if window.applied:
            shares = _shares(twin, params, window)
            mean, a, b = _measure(shares, layers)
            n = len(shares)
            alone = _measure_experts(shares, mean, layers, settings, a)
            factors = oracle.update(a, b, n, window.batch_size, alone)
            by_name = {name: factors[layer] for name, layer in layers.items()}
            _step(optimizer, params, mean, settings, applied, by_name)
            applied += 1
            if twin is not model:
                _copy_weights(model, twin)
        else:
            oracle.skip()
        after = {name: p.detach().clone() for name, p in params.items()}
        moved = {name: float((after[name] - before[name]).norm()) for name in params}
        yield Snapshot(after, moved, oracle.report())


def _shares(twin: nn.Module, params: Mapping[str, Tensor], window: Window) -> dict[tuple[int, int], Gradients]:
    """Of every micro-batch in the averaged gradient, by (rank, pass)."""
    world, shares = len(window.batches), {}
    for rank, micros in enumerate(window.batches):
        for number, batch in enumerate(micros):
            gradients = _gradients(twin, params, batch, window.divisor)
            shares[rank, number] = {name: gradient / world for name, gradient in gradients.items()}
    return shares


def _measure(
    shares_of: Mapping[tuple[int, int], Gradients], layers: Mapping[str, str]
) -> tuple[Gradients, dict[str, float], dict[str, float]]:
    """The averaged gradient of every parameter that has one, and A and B per layer."""
    shares = list(shares_of.values())
    n = len(shares)
    mean: Gradients = {}
    for share in shares:
        for name, gradient in share.items():
            mean[name] = mean[name] + gradient if name in mean else gradient
    a = dict.fromkeys(layers.values(), 0.0)
    for share in shares:
        for layer, square in _sum_by_layer(layers, _squares(share)).items():
            a[layer] += n**2 * square / n  # the micro-gradient is n times the share
    return mean, a, _sum_by_layer(layers, _squares(mean))


def _measure_experts(
    shares: Mapping[tuple[int, int], Gradients],
    mean: Gradients,
    layers: Mapping[str, str],
    settings: Settings,
    a: dict[str, float],
) -> set[str]:
    """Put an expert's own part into A (modified in place). The layers with one micro-gradient, which tells no noise.

    A micro-gradient of an expert is the mean over the micro-batches of a pass on the ranks that are `together`. There
    are `few` of them. A dense layer with the same noise and signal would have A = B + (n - 1) / (few - 1) (A' - B).
    """
    n, alone, together = len(shares), set(), settings.together
    passes = 1 + max(number for _, number in shares)
    spread = [name for name in mean if name.startswith(settings.spread) and ".deepspeed_experts." in name]
    for name in [name for name in spread if together and name in layers]:
        few = n // len(together[0])
        b = float(mean[name].square().sum())
        as_dense = sum(float(share[name].square().sum()) * n for share in shares.values() if name in share)
        own = 0.0
        for ranks in together:
            for number in range(passes):
                parts = [shares[rank, number][name] for rank in ranks if name in shares[rank, number]]
                own += few**2 * float(sum(parts).square().sum()) / few if parts else 0.0
        if few == 1:
            alone.add(layers[name])
        a[layers[name]] += b + (n - 1) / max(few - 1, 1) * (own - b) - as_dense
    return alone


def _gradients(twin: nn.Module, params: Mapping[str, Tensor], batch: tuple[Any, ...], divisor: float) -> Gradients:
    twin.zero_grad(set_to_none=True)
    device = next(twin.parameters()).device
    inputs = [value.to(device) if isinstance(value, Tensor) else value for value in batch]
    (twin(*inputs) / divisor).backward()
    found = {name: twin.get_parameter(name).grad for name in params}
    return {name: gradient.cpu().double() for name, gradient in found.items() if gradient is not None}


def _step(
    optimizer: torch.optim.Optimizer,
    params: Mapping[str, Tensor],
    mean: Gradients,
    settings: Settings,
    applied: int,
    factors: Mapping[str, float],
) -> None:
    norm = sum(_squares(mean).values()) ** 0.5
    shrink = max(1.0, (norm + 1e-6) / settings.clipping) if settings.clipping else 1.0
    for name, p in params.items():
        if name in mean:
            p.grad = mean[name] / shrink
        else:
            p.grad = torch.zeros_like(p) if settings.idle == "zeros" else None
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * settings.schedule(applied) * factors.get(group["name"], 1.0)
    optimizer.step()


def _base_rule(groups: Sequence[Mapping[str, Any]], keys: Mapping[str, Any]) -> torch.optim.Optimizer:
    base = keys["base"]
    default = keys["weight_decay"] if keys["weight_decay"] is not None else DECAY[base]
    single = [
        {
            "params": [p],
            "name": name,
            "base_lr": group.get("lr", keys["lr"]),
            "weight_decay": 0.0 if _matches(name, keys["no_decay"]) else group.get("weight_decay", default),
        }
        for group in groups
        for name, p in group["params"]
    ]
    moments = {"betas": tuple(keys["betas"]), "eps": keys["eps"]}
    trust = {"trust_coefficient": keys["trust_coefficient"] or TRUST.get(base), "trust_clip": keys["trust_clip"]}
    if base == "adamw":
        return torch.optim.AdamW(single, **moments)
    if base == "lamb":
        return Lamb(single, **moments, **trust)
    if base == "lars":
        return Lars(single, momentum=keys["momentum"], **trust)
    return torch.optim.SGD(single, lr=0.0, momentum=keys["momentum"], nesterov=keys["nesterov"])


def _narrow_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A narrower copy; the weights of the model itself are rounded once, as masters are made from such weights."""
    twin = copy.deepcopy(model).to(dtype)
    _copy_weights(twin, model)
    return twin


@torch.no_grad()
def _copy_weights(source: nn.Module, target: nn.Module) -> None:
    for name, p in source.named_parameters():
        target.get_parameter(name).copy_(p)


def _squares(gradients: Gradients) -> dict[str, float]:
    return {name: float(gradient.square().sum()) for name, gradient in gradients.items()}


def _sum_by_layer(layers: Mapping[str, str], values: Mapping[str, float]) -> dict[str, Any]:
    totals: dict[str, Any] = dict.fromkeys(layers.values(), 0)
    for name, value in values.items():
        if name in layers:
            totals[layers[name]] += value
    return totals


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
