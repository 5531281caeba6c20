"""The decision of a batch that grows, the schedules in samples, and plain PyTorch."""

from __future__ import annotations

import copy
import json
import logging
import math
import re
from typing import Any

import pytest
import torch
from torch import nn

import ds_lena
from ds_lena import BatchGrowth, ConfigError, cosine, linear, warmup_stable_decay
from ds_lena.growing import Growing
from ds_lena.growth import from_keys
from ds_lena.watch_config import WatchConfig
from ds_lena.watching import Watch


def growth(**keys: Any) -> BatchGrowth:
    return BatchGrowth(**{"factor": 1.0, "smallest": 2, "largest": 128, "every": 1} | keys)


@pytest.mark.parametrize(
    ("now", "noise_scale", "keys", "expected"),
    [
        (4, 7.9, {}, 7),
        (4, 7.9, {"factor": 0.8}, 6),
        (4, 100.0, {}, 8),  # at most twice as large
        (4, 1.0, {}, 4),  # it never shrinks
        (4, 49.0, {"power": 0.5}, 7),
        (4, 9.0, {"power": 0.5, "factor": 2.0}, 6),
        (4, 3.9, {"shrink": True}, 3),
        (4, 0.1, {"shrink": True}, 2),
        (100, 1000.0, {}, 128),
        (4, math.inf, {}, 4),
        (4, -3.0, {"shrink": True}, 4),
        (4, math.nan, {}, 4),
        (4, 0.0, {"shrink": True}, 4),
    ],
)
def test_one_decision(now: int, noise_scale: float, keys: dict[str, Any], expected: int) -> None:
    assert growth(**keys).next(now, noise_scale, replicas=1) == expected


def test_a_batch_is_a_multiple_of_the_ranks_and_is_rounded_down() -> None:
    assert growth(largest=31).bounds(4) == (1, 7)
    assert growth(largest=31).next(4, 27.9, replicas=4) == 6
    assert growth(largest=31).next(6, 1000.0, replicas=4) == 7
    with pytest.raises(ConfigError, match='Set "largest" to 16 or more'):
        growth(smallest=2, largest=15).bounds(16)


def test_it_grows_where_a_window_can_begin_and_never_above_what_was_wanted() -> None:
    assert growth().next(4, 7.0, 1, done=16) == 4
    assert growth().next(4, 7.0, 1, done=20) == 5
    assert growth().next(4, 7.0, 1, done=24) == 6
    assert growth(shrink=True).next(6, 2.0, 1, done=6) == 2
    assert growth(shrink=True).next(6, 4.0, 1, done=6) == 6  # a window of 4 or 5 cannot begin there
    assert growth(shrink=True).next(6, 1.0, 1, done=6, lowest=3) == 3


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"factor": 0.0}, '"factor": 0.0'),
        ({"factor": math.inf}, "a finite number > 0"),
        ({"factor": 10**400}, "a finite number > 0"),
        ({"smallest": 0}, '"smallest": 0'),
        ({"largest": 2.5}, '"largest": 2.5'),
        ({"largest": 1}, '"largest": 1 is below "smallest": 2'),
        ({"by": "loss"}, '"noise_scale" or "noise_scale_low"'),
        ({"every": True}, '"every": True'),
        ({"shrink": 1}, "true or false"),
        ({"power": 0}, '"power": 0'),
        ({"lr_power": 2}, '"lr_power": 2'),
    ],
)
def test_bad_keys_are_told(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        growth(**keys)


@pytest.mark.parametrize(
    ("cls", "keys", "message"),
    [
        (BatchGrowth, {"largest": 8}, "got {'largest': 8}; factor, smallest must be given, too. Its keys are factor,"),
        (ds_lena.SampleSchedule, {"shape": "cosine"}, "total must be given, too. Its keys are shape, total,"),
        (BatchGrowth, {"factor": 1, "smalest": 2, "largest": 8}, "allowed is a BatchGrowth, or its keys factor,"),
    ],
)
def test_keys_that_are_missing_or_unknown_are_told(cls: type, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        from_keys(cls, keys)


# -- schedules --------------------------------------------------------------------------------------------------------


def test_schedules_at_their_corners() -> None:
    rise = [schedule(5) for schedule in (cosine(100, 10), linear(100, 10), warmup_stable_decay(100, 10, 20))]
    assert rise == [0.5] * 3
    assert cosine(110, 10, floor=0.2)(60) == pytest.approx(0.6)
    assert cosine(100)(25) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert linear(110, 10)(85) == pytest.approx(0.25)
    stable = warmup_stable_decay(100, 10, 20, floor=0.5)
    assert [stable(samples) for samples in (0, 10, 80, 90, 100, 200)] == pytest.approx([0, 1, 1, 0.75, 0.5, 0.5])
    assert linear(10, 10)(10) == 0 and linear(100)(0) == 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"shape": "step", "total": 1}, "allowed is one of constant, cosine"),
        ({"shape": "linear", "total": 0}, "total > 0"),
        ({"shape": "linear", "total": 10, "warmup": 11}, "together at most total"),
        ({"shape": "linear", "total": 10, "decay": 5}, "no other shape has one"),
        ({"shape": "warmup-stable-decay", "total": 10}, "which needs it"),
        ({"shape": "linear", "total": 10, "floor": 2}, "from 0 to 1"),
    ],
)
def test_bad_schedules_are_told(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ds_lena.SampleSchedule(**keys)


# -- plain PyTorch ----------------------------------------------------------------------------------------------------


class Line(nn.Module):
    """Its gradient is the mean of the samples, wherever the weights are: with 2 samples the noise scale is 8."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight).mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, growing: Growing, budget: int) -> list[tuple[int, float]]:
    generator = torch.Generator().manual_seed(3)
    updates = []
    while growing.samples < budget:
        updates.append((growing.accumulation, optimizer.param_groups[0]["lr"]))
        n = growing.accumulation
        for _ in range(n):
            (model(0.25 + torch.randn(2, 2000, generator=generator)) / n).backward()
        optimizer.step()
        optimizer.zero_grad()
    return updates


@pytest.mark.parametrize("name", ["AdamW", "LENA"])
def test_a_loop_reads_the_number_and_it_follows_the_noise_scale(name: str) -> None:
    model = Line()
    makers = {
        "AdamW": lambda: torch.optim.AdamW(model.parameters(), lr=0.5),
        "LENA": lambda: ds_lena.LENA(model.named_parameters(), lr=0.5, warmup="none", micro_batch_size=2),
    }
    optimizer = makers[name]()
    schedule = linear(total=1000)
    growing = ds_lena.grow(model, growth(every=2), schedule, optimizer, micro_batch_size=2)
    updates = train(model, optimizer, growing, 1000)
    assert [n for n, _ in updates[:5]] == [2, 2, 4, 4, 7]
    assert updates[-1][0] in (8, 9)
    done = 0
    for n, lr in updates:
        assert lr == pytest.approx(0.5 * schedule(2 * done))
        done += n
    assert growing.samples == 2 * done == growing.watch.report()["samples"]
    report = growing.report()
    assert report["most_replicas"] == report["n"] and report["noise_scale"] == pytest.approx(8, rel=0.15)
    assert f"up to {report['n']} ranks" in report["advice"]


def test_the_learning_rate_follows_the_batch() -> None:
    model = Line()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    schedule = linear(total=1000)
    growing = ds_lena.grow(model, growth(every=2, lr_power=0.5), schedule, optimizer, micro_batch_size=2)
    done = 0
    for n, lr in train(model, optimizer, growing, 200):
        assert lr == pytest.approx(0.5 * schedule(2 * done) * (n / 2) ** 0.5)
        done += n
    assert growing.accumulation > 4
    lena = ds_lena.LENA(model.named_parameters(), lr=0.5, warmup="none", micro_batch_size=2)
    with pytest.raises(ConfigError, match="with LENA, whose gain"):
        ds_lena.grow(model, growth(lr_power=0.5), None, lena)


def made(replicas: int, size: int | None, **keys: Any) -> Growing:
    memory: Any = None
    return Growing(growth(**keys), None, Watch(WatchConfig(), None, lambda: memory), replicas, size)


def test_another_number_of_ranks_keeps_the_batch_in_samples(caplog: pytest.LogCaptureFixture) -> None:
    before = made(replicas=2, size=4)
    before.accumulation = 12
    before.saw(30)
    saved = json.loads(json.dumps(before.state_dict()))
    for replicas, size, accumulation in ((4, 4, 6), (1, 4, 24), (2, 8, 6), (3, 2, 16)):
        after = made(replicas, size)
        with caplog.at_level(logging.WARNING, "ds_lena"):
            caplog.clear()
            after.load_state_dict(saved)
        assert after.accumulation == accumulation and after.n * size == 96
        assert after.samples == 240 and after.micro_batches == 240 // size
    after = made(5, 4)
    after.load_state_dict(saved)
    assert after.n * 4 == 80 and "is no multiple of 5 ranks x 4 samples" in caplog.text


def test_a_state_is_loaded_before_or_after_and_within_the_bounds(caplog: pytest.LogCaptureFixture) -> None:
    def begin(largest: int = 13) -> tuple[torch.optim.Optimizer, Growing]:
        model = Line()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
        schedule = linear(total=1000, warmup=100)
        return optimizer, ds_lena.grow(model, growth(every=1, largest=largest), schedule, optimizer, micro_batch_size=2)

    _, growing = begin()
    saved = growing.state_dict() | {"n": 12, "samples": 60}
    other, later = begin()
    assert other.param_groups[0]["lr"] == 0.0
    later.load_state_dict(json.loads(json.dumps(saved)))
    assert other.param_groups[0]["lr"] == pytest.approx(0.5 * 0.6) and later.accumulation == 12
    _, bounded = begin(largest=8)
    bounded.load_state_dict(saved)
    assert bounded.accumulation == 8 and "batch of 12 micro-batches is outside" in caplog.text
    with pytest.raises(ds_lena.StateError, match='has no "first"'):
        bounded.load_state_dict({})


def test_a_batch_grows_once_and_knows_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    growing = ds_lena.grow(model, growth(), None, optimizer, micro_batch_size=2)
    with pytest.raises(ds_lena.StateError, match="grows already"):
        ds_lena.grow(model, growth(), None, optimizer)
    monkeypatch.setattr("ds_lena.batch.world_size", lambda group: 2)
    with pytest.raises(ds_lena.StateError, match="there are 2 ranks now, and there were 1 when"):
        train(model, optimizer, growing, 20)


def test_a_lena_in_its_warm_up_is_resumed_to_the_bit() -> None:
    def begin() -> tuple[Line, ds_lena.LENA, Growing]:
        model = Line()
        lena = ds_lena.LENA(model.named_parameters(), lr=0.5, total_steps=600, micro_batch_size=2)
        return model, lena, ds_lena.grow(model, growth(every=1), None, lena)

    def go_on(model: Line, lena: ds_lena.LENA, growing: Growing, micro_batches: int) -> None:
        while growing.micro_batches < micro_batches:
            generator = torch.Generator().manual_seed(growing.micro_batches)
            for _ in range(growing.accumulation):
                x = 0.25 + torch.randn(2, 2000, generator=generator)
                (model(x) / growing.accumulation).backward()
            lena.step()
            lena.zero_grad()

    model, lena, growing = begin()
    go_on(model, lena, growing, 20)
    saved = copy.deepcopy((model.state_dict(), lena.state_dict(), growing.state_dict()))
    assert growing.accumulation > 4
    go_on(model, lena, growing, 60)
    other, resumed, later = begin()
    for one, state in zip((other, resumed, later), saved, strict=True):
        one.load_state_dict(state)
    go_on(other, resumed, later, 60)
    assert torch.equal(other.weight, model.weight) and 0 < ds_lena.report(lena)["layers"]["weight"]["warmup"] < 1


def test_a_refusal_leaves_nothing_behind() -> None:
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match='give the watch "differences": true'):
        ds_lena.grow(model, growth(smallest=1), None, optimizer, micro_batch_size=2)
    ds_lena.grow(model, growth(smallest=1), None, optimizer, micro_batch_size=2, differences=True)
    lena = ds_lena.LENA(model.named_parameters(), warmup="none")
    with pytest.raises(ConfigError, match=r'Use "smallest": 2\.'):
        ds_lena.grow(model, growth(smallest=1), None, lena)


def test_what_would_not_be_counted_is_told() -> None:
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    growing = ds_lena.grow(model, growth(), None, optimizer, micro_batch_size=2)
    growing.watch.close()
    with pytest.raises(ds_lena.StateError, match="the watch of this growing batch was closed"):
        train(model, optimizer, growing, 20)
    lena = ds_lena.LENA(model.named_parameters(), warmup="none")
    ds_lena.grow(model, growth(), None, lena)
    with pytest.raises(ds_lena.UnsupportedError, match=r"ds_lena\.grow: optimizer\.step\(closure\)"):
        lena.step(lambda: torch.zeros(()))


def test_what_plain_pytorch_cannot_do_is_told() -> None:
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="one micro-batch in an update tells no noise scale"):
        ds_lena.grow(model, growth(smallest=1), None, optimizer)
    with pytest.raises(ConfigError, match="nobody says how many samples"):
        ds_lena.grow(model, growth(), linear(10), optimizer)
    with pytest.raises(ConfigError, match="allowed is a BatchGrowth"):
        ds_lena.grow(model, 4, None, optimizer)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"watch\(model, optimizer\)"):
        ds_lena.grow(model, growth())


def test_differences_let_it_grow_from_one_micro_batch() -> None:
    model = Line()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    growing = ds_lena.grow(model, growth(smallest=1), None, optimizer, micro_batch_size=2, differences=True)
    assert [n for n, _ in train(model, optimizer, growing, 20)][:3] == [1, 1, 2]
