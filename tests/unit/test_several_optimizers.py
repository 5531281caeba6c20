"""One update by several optimizers in plain PyTorch: Muon for the matrices and AdamW for the rest, say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Muon

import ds_lena

MICROS = 4


def make(split: Callable[[Sequence[nn.Parameter]], list[torch.optim.Optimizer]]) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
    return model, split(list(model.parameters()))


def backward(model: nn.Module, seed: int, micros: int = MICROS) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(micros):
        (model(torch.randn(3, 6, generator=generator)).square().mean() / micros).backward()


def train(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], updates: int = 4) -> None:
    for update in range(updates):
        backward(model, update)
        for one in optimizers if update % 2 else reversed(optimizers):
            one.step()
            one.zero_grad()


def apart(parameters: Sequence[nn.Parameter]) -> list[torch.optim.Optimizer]:
    return [SGD([p], lr=0.1) for p in parameters]


def together(parameters: Sequence[nn.Parameter]) -> list[torch.optim.Optimizer]:
    return [SGD(parameters, lr=0.1)]


def muon(parameters: Sequence[nn.Parameter]) -> list[torch.optim.Optimizer]:
    return [Muon([p for p in parameters if p.ndim == 2], lr=0.02), AdamW([p for p in parameters if p.ndim < 2])]


def lena(parameters: Sequence[nn.Parameter]) -> list[torch.optim.Optimizer]:
    return [muon(parameters)[0], ds_lena.LENA([p for p in parameters if p.ndim < 2], warmup="none")]


def test_it_is_the_measurement_of_one_optimizer_that_moves_all() -> None:
    reports = []
    for split in (apart, together):
        model, optimizers = make(split)
        watch = ds_lena.watch(model, optimizers, micro_batch_size=3)
        train(model, optimizers)
        reports.append(watch.report())
    assert reports[0] == reports[1] and reports[0]["update"] == 4 and len(reports[0]["layers"]) == 4


@pytest.mark.parametrize("split", [muon, lena])
def test_the_weights_do_not_know_of_it(split: Any) -> None:
    weights, gains = [], []
    for is_watched in (True, False):
        model, optimizers = make(split)
        if is_watched:
            watch = ds_lena.watch(model, optimizers)
        train(model, optimizers)
        weights.append(nn.utils.parameters_to_vector(model.parameters()))
        gains += [ds_lena.report(one) for one in optimizers if isinstance(one, ds_lena.LENA)]
    assert torch.equal(*weights)
    assert {"0.weight", "0.bias", "2.weight", "2.bias"} == watch.report()["layers"].keys()
    assert gains[:1] == gains[1:], "LENA measures its own layers, and is not disturbed"


def test_its_growth_sets_the_learning_rate_of_all() -> None:
    model, optimizers = make(muon)
    growth = ds_lena.BatchGrowth(factor=8, smallest=2, largest=8, every=1)
    growing = ds_lena.grow(model, growth, ds_lena.linear(total=60), optimizers, micro_batch_size=3)
    found = []
    while growing.samples < 60:
        backward(model, growing.samples, growing.accumulation)
        found.append(growing.accumulation)
        for one in optimizers:
            one.step()
            one.zero_grad()
    assert sum(found) * 3 == growing.samples and max(found) > 2
    assert [group["lr"] for one in optimizers for group in one.param_groups] == [0.0, 0.0]


def test_what_is_no_update_of_all_is_told() -> None:
    model, (first, second) = make(muon)
    watch = ds_lena.watch(model, [first, second])
    assert ds_lena.watch(model, (first, second)) is watch
    for others in (first, [second], [first, second, AdamW(model.parameters())]):
        with pytest.raises(ds_lena.ConfigError, match="watched already, with other keys or beside other optimizers"):
            ds_lena.watch(model, others)
    for wrong in ([], [first, "adamw"], "adamw", [first, first]):
        with pytest.raises(ds_lena.ConfigError, match=r"watch\(model, \[muon, adamw\]\)"):
            ds_lena.watch(model, wrong)
    backward(model, 0)
    first.step()
    with pytest.raises(ds_lena.UnsupportedError, match=r"step\(\) of Muon again, before step\(\) of AdamW"):
        first.step()
    backward(model, 0)
    first.step()
    model.zero_grad()
    backward(model, 1)
    with pytest.raises(ds_lena.UnsupportedError, match=r"a backward pass, or step\(\) of AdamW"):
        second.step()
    assert watch.report()["update"] == 0
    train(model, [first, second], 2)
    assert watch.report()["update"] == 2, "after an error the next update is one again"
    watch.close()
    first.step()
    second.step()
    assert watch.report()["update"] == 2
