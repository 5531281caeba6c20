"""A batch that grows under DeepSpeed: the weights are those of its plan, at every stage, with every optimizer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ds_lena
from ds_lena import BatchGrowth, SampleSchedule, cosine
from tests.helpers import reference
from tests.helpers.marks import rest
from tests.integrations._engines import LENA, MICRO_BATCH, Net, config, engine, said
from tests.integrations._programs import EXAMPLES, launch
from tests.integrations._ranks import WORLD, Ranks

UPDATES = 7
GROWTH = {"factor": 300.0, "smallest": 2, "largest": 13, "every": 1}  # on 2 ranks: 1, 2, 4 and 6 each
TOTAL = 120
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
    "LENA": {"type": "LENA", "params": LENA},
    "LENA, warming up": {"type": "LENA", "params": LENA | {"total_steps": 200}},
    "Muon": {"type": "Muon", "params": {"lr": 0.01, "torch_adam": True}},  # FusedAdam would be compiled
}


def micro_batch(number: int, rank: int) -> tuple[Tensor, Tensor]:
    """The `number`th of a rank in the run, whichever update takes it."""
    generator = torch.Generator().manual_seed(1 + 10 * number + rank)
    return torch.randn(MICRO_BATCH, 4, generator=generator) + 1, torch.randn(MICRO_BATCH, 4, generator=generator) + 1


def entries(stage: int, optimizer: str, precision: str = "fp32", **more: Any) -> dict[str, Any]:
    zero = {"reduce_scatter": False} if optimizer == "Muon" else {}
    more = {"zero": zero, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False} | more
    return config(stage, precision, **more) | {"optimizer": OPTIMIZERS[optimizer]}


def run(made: Any, updates: int, first: int = 0) -> list[int]:
    """The windows of so many updates; `first`: the micro-batches of a rank that were taken before."""
    windows, number = [0], first
    while len(windows) <= updates:
        made.backward(made(*micro_batch(number, torch.distributed.get_rank())))
        before = made.global_steps
        made.step()
        number, windows[-1] = number + 1, windows[-1] + 1
        if made.global_steps > before:
            windows.append(0)
    return windows[:-1]


def weights(made: Any) -> dict[str, Tensor]:
    import deepspeed

    named = dict(made.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values())):
        return {name: p.detach().double().clone() for name, p in named.items()}


def grown(
    stage: int, optimizer: str, precision: str, schedule: SampleSchedule | None = None, lr_power: float = 0.0
) -> Any:
    with engine(entries(stage, optimizer, precision)) as made:
        growing = (
            ds_lena.grow(made, BatchGrowth(**GROWTH, lr_power=lr_power), schedule, smoothing=0.5)
            if optimizer != "LENA"
            else (ds_lena.grow(made, BatchGrowth(**GROWTH), schedule))
        )
        windows = run(made, UPDATES)
        assert growing.micro_batches == WORLD * sum(windows)
        assert growing.samples == MICRO_BATCH * WORLD * sum(windows) == growing.watch.report()["samples"]
        assert made.train_batch_size() == growing.n * MICRO_BATCH
        return windows, weights(made), growing.report()


def gradients(twin: nn.Module, start: int, window: int) -> None:
    """Leave the average over a window of all ranks in `.grad`."""
    for number in range(start, start + window):
        for rank in range(WORLD):
            (twin(*(x.double() for x in micro_batch(number, rank))) / (window * WORLD)).backward()


def planned(windows: list[int], schedule: SampleSchedule | None, lr_power: float = 0.0) -> dict[str, Tensor]:
    """The weights of torch's AdamW in float64 after windows of this plan."""
    twin = Net().double()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.01)
    done = 0
    for window in windows:
        by_samples = schedule(done * WORLD * MICRO_BATCH) if schedule else 1
        optimizer.param_groups[0]["lr"] = 0.01 * by_samples * (window / windows[0]) ** lr_power
        gradients(twin, done, window)
        optimizer.step()
        optimizer.zero_grad()
        done += window
    return {name: p.detach() for name, p in twin.named_parameters()}


def planned_by_lena(windows: list[int]) -> dict[str, Tensor]:
    """The same of the literal reference of LENA."""
    done, seen = 0, []
    for window in windows:
        batches = [
            [tuple(x.double() for x in micro_batch(number, rank)) for number in range(done, done + window)]
            for rank in range(WORLD)
        ]
        seen.append(reference.Window(batches, window, MICRO_BATCH))
        done += window
    twin = Net().double()
    groups = [{"params": list(twin.named_parameters())}]
    return list(reference.train(twin, groups, LENA, seen, reference.Settings(grows=True)))[-1].params


def path_error(found: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    start = {name: p.detach() for name, p in Net().double().named_parameters()}
    distance = sum(float((found[name] - p).square().sum()) for name, p in right.items())
    return (distance / sum(float((p - start[name]).square().sum()) for name, p in right.items())) ** 0.5


def by_hand(stage: int, windows: list[int]) -> dict[str, Tensor]:
    """The same by Muon at a configured accumulation of 1, with boundaries and the division by hand."""
    with engine(entries(stage, "Muon", gradient_accumulation_steps=1)) as made:
        number = 0
        for window in windows:
            for place in range(window):
                made.set_gradient_accumulation_boundary(place == window - 1)
                made.backward(made(*micro_batch(number, torch.distributed.get_rank())) / window)
                made.step()
                number += 1
        return weights(made)


STAGES = [(stage, "AdamW", "fp32") for stage in range(4)]
CASES = rest(
    [(stage, name, "fp32") for stage in range(4) for name in ("AdamW", "LENA")]
    + [(stage, "AdamW", "fp32 + offload") for stage in (1, 2, 3)],
    [*STAGES, (0, "LENA", "fp32"), (2, "LENA", "fp32"), (2, "AdamW", "fp32 + offload")],
)


@pytest.mark.parametrize(("stage", "optimizer", "precision"), CASES)
def test_the_weights_are_those_of_the_plan(ranks: Ranks, stage: int, optimizer: str, precision: str) -> None:
    (windows, found, report), (others, _, its) = ranks.run(grown, stage, optimizer, precision)
    assert windows == others and report == its
    assert windows[0] == 1 and windows[-1] == 6 and len(set(windows)) >= 3
    right = planned_by_lena(windows) if optimizer == "LENA" else planned(windows, None)
    assert path_error(found, right) < 1e-5


@pytest.mark.parametrize("stage", rest(range(4), [2]))
def test_muon_grows_alike(ranks: Ranks, stage: int) -> None:
    windows, found, _ = ranks.run(grown, stage, "Muon", "fp32")[0]
    assert windows[0] == 1 and windows[-1] > 4
    assert path_error(found, ranks.run(by_hand, stage, windows)[0]) < 1e-5


SCHEDULES = [
    cosine(total=80, warmup=8, floor=0.1),
    *rest((ds_lena.linear(total=200), ds_lena.warmup_stable_decay(total=120, warmup=4, decay=80)), []),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_learning_rate_is_that_of_the_samples(ranks: Ranks, schedule: SampleSchedule) -> None:
    for windows, found, _ in ranks.run(grown, 1, "AdamW", "fp32", schedule):
        assert path_error(found, planned(windows, schedule)) < 1e-5


def test_the_learning_rate_follows_the_batch(ranks: Ranks) -> None:
    for windows, found, _ in ranks.run(grown, 2, "AdamW", "fp32", None, 0.5):
        assert windows[-1] > windows[0] and path_error(found, planned(windows, None, 0.5)) < 1e-5


# -- checkpoints ------------------------------------------------------------------------------------------------------


def resumed(folder: str, optimizer: str, stage: int) -> tuple[list[int], list[int], bool, list[str]]:
    """Seven updates at once, and four and three in another engine; whether weights, clock and n are the same."""

    def start(made: Any) -> Any:
        keys = {} if "LENA" in optimizer else {"smoothing": 0.5}
        return ds_lena.grow(made, BatchGrowth(**GROWTH | {"every": 2}), cosine(total=TOTAL), **keys)

    with engine(entries(stage, optimizer)) as made:
        growing = start(made)
        windows = run(made, 4)
        made.save_checkpoint(folder, client_state={"mine": 1})
        windows += run(made, UPDATES - 4, sum(windows))
        whole, last = weights(made), growing.state_dict()
    with engine(entries(stage, optimizer), Net(seed=1)) as made, said() as messages:
        growing = start(made)
        _, client_state = made.load_checkpoint(folder)
        again = run(made, UPDATES - 4, growing.micro_batches // WORLD)
        same = all(torch.equal(p, whole[name]) for name, p in weights(made).items())
        assert client_state["mine"] == 1 and not any("growth" in key for key in client_state)
        assert growing.state_dict() == last
        return windows, again, same, messages


@pytest.mark.parametrize(
    ("optimizer", "stage"),
    rest(
        [(name, stage) for name in OPTIMIZERS for stage in (1, 2, 3)],
        [("AdamW", 2), ("LENA, warming up", 1), ("AdamW", 3)],
    ),
)
def test_resuming_goes_on_to_the_bit(ranks: Ranks, tmp_path: Path, optimizer: str, stage: int) -> None:
    for windows, again, is_same, messages in ranks.run(resumed, str(tmp_path), optimizer, stage):
        assert windows[3] < windows[4], "it has grown at the checkpoint, and not since"
        assert again == windows[4:] and is_same
        assert messages == []


def load_without(folder: str) -> tuple[list[str], list[int]]:
    with engine(entries(1, "AdamW")) as made:
        run(made, 2)
        made.save_checkpoint(folder)
    with engine(entries(1, "AdamW")) as made, said() as messages:
        ds_lena.grow(made, BatchGrowth(1.0, 6, 6))
        made.load_checkpoint(folder)
        return messages, run(made, 1)


def test_a_checkpoint_without_growth_is_told_and_starts_it(ranks: Ranks, tmp_path: Path) -> None:
    messages, windows = ranks.run(load_without, str(tmp_path))[0]
    assert any("saved without a growing batch" in message for message in messages)
    assert windows == [3]


# -- what is refused, and what is answered ----------------------------------------------------------------------------


def refusal(growth: dict[str, Any], more: dict[str, Any], differs: bool = False) -> str:
    if differs:
        growth = growth | {"factor": 1.0 + torch.distributed.get_rank()}
    begun = more.pop("begun", False)
    try:
        with engine(entries(1, "AdamW", **more)) as made:
            if begun:
                ds_lena.watch(made)
                made.backward(made(*micro_batch(0, torch.distributed.get_rank())))
                made.step()
            if growth:
                ds_lena.grow(made, BatchGrowth(**growth))
                ds_lena.grow(made, BatchGrowth(**growth))
    except ds_lena.LenaError as error:
        return str(error)
    return ""


WARMUP = {"type": "WarmupLR", "params": {"warmup_num_steps": 3}}


@pytest.mark.parametrize(
    ("growth", "more", "differs", "message"),
    [
        (GROWTH, {"scheduler": WARMUP}, False, "a learning-rate scheduler, WarmupLR. It counts updates"),
        (GROWTH | {"smallest": 1, "largest": 1}, {}, False, 'Set "largest" to 2 or more, or use fewer ranks'),
        (GROWTH, {}, True, '"factor" is not the same on all ranks: 1.0 on rank 0, 2.0 on rank 1'),
        (GROWTH, {}, False, "grows already"),
        ({}, {"batch_growth": 4}, False, '"batch_growth": 4 is not allowed'),
        ({}, {"batch_growth": {"factor": 1}}, False, "Its keys are factor, smallest, largest"),
        ({}, {"batch_growth": GROWTH, "scheduler": WARMUP}, False, "It counts updates"),
        ({}, {"batch_growth": GROWTH | {"schedule": {"shape": "cosine"}}}, False, "Its keys are shape, total"),
        (GROWTH, {"begun": True}, False, "ds_lena.grow: 1 of 2 micro-batches of an update are done already"),
        (GROWTH, {"gradient_allreduce_op": "sum"}, False, "ds_lena.watch does not support"),
    ],
)
def test_what_is_refused(
    ranks: Ranks, growth: dict[str, Any], more: dict[str, Any], differs: bool, message: str
) -> None:
    for told in ranks.run(refusal, growth, more, differs):
        assert message in told


def by_entry() -> tuple[list[int], float, int]:
    entry = GROWTH | {"schedule": {"shape": "linear", "total": 80, "warmup": 4}}
    with engine(entries(1, "AdamW", noise_scale={"smoothing": 0.5}, batch_growth=entry)) as made:
        windows = run(made, 3)
        return windows, made.get_lr()[0], made.ds_lena_growing.samples


def test_an_entry_of_the_json_is_enough(ranks: Ranks) -> None:
    for windows, lr, samples in ranks.run(by_entry):
        assert windows == [1, 2, 4] and samples == 28
        assert lr == pytest.approx(0.01 * (80 - 28) / 76)


def with_nan() -> tuple[list[int], list[int], int]:
    with engine(entries(2, "AdamW", "bf16")) as made:
        growing = ds_lena.grow(made, BatchGrowth(**GROWTH))
        before = run(made, 2)
        skipped = growing.accumulation
        for _ in range(skipped):
            made.backward(made(*micro_batch(0, 0)) * float("nan"))
            made.step()
        return [*before, skipped], [skipped, growing.accumulation], growing.micro_batches


def test_a_skipped_update_decides_nothing_and_its_samples_were_seen(ranks: Ranks) -> None:
    for windows, accumulation, seen in ranks.run(with_nan):
        assert accumulation[0] == accumulation[1]
        assert seen == WORLD * sum(windows)


def ended_by_hand() -> list[str]:
    with engine(entries(1, "AdamW")) as made, said() as messages:
        ds_lena.grow(made, BatchGrowth(1.0, 4, 4))
        for _ in range(2):
            made.set_gradient_accumulation_boundary(True)
            made.backward(made(*micro_batch(0, 0)))
            made.step()
        return messages


def test_windows_of_another_length_are_told_once(ranks: Ranks) -> None:
    messages = ranks.run(ended_by_hand)[0]
    assert len(messages) == 1 and "has had 1 micro-batches on this rank, where 2 were set" in messages[0]


def saved_by_two(folder: str) -> dict[str, Any]:
    with engine(entries(0, "AdamW")) as made:
        growing = ds_lena.grow(made, BatchGrowth(**GROWTH), cosine(total=TOTAL))
        run(made, 4)
        made.save_checkpoint(folder)
        return growing.report()


def loaded_by_one(folder: str) -> tuple[dict[str, Any], list[int], float]:
    with engine(entries(0, "AdamW")) as made:
        growing = ds_lena.grow(made, BatchGrowth(**GROWTH), cosine(total=TOTAL))
        made.load_checkpoint(folder)
        return growing.report(), run(made, 1), made.get_lr()[0]


@pytest.mark.full
def test_another_world_size_keeps_the_batch_in_samples(ranks: Ranks, tmp_path: Path) -> None:
    alone = Ranks(tmp_path, world=1)
    try:
        before = ranks.run(saved_by_two, str(tmp_path))[0]
        after, windows, lr = alone.run(loaded_by_one, str(tmp_path))[0]
    finally:
        alone.stop()
    assert (after["n"], after["samples"], after["replicas"]) == (before["n"], before["samples"], 1)
    assert windows == [before["n"]] == [WORLD * before["accumulation"]]
    assert lr == pytest.approx(0.01 * cosine(TOTAL)(before["samples"] + before["n"] * MICRO_BATCH))


def without_signal() -> list[int]:
    """All ranks and micro-batches together have a gradient of exactly zero."""
    with engine(entries(1, "AdamW", batch_growth=GROWTH)) as made:
        windows = []
        for _ in range(3):
            windows.append(made.gradient_accumulation_steps())
            sign = 1 if torch.distributed.get_rank() else -1
            for _ in range(windows[-1]):
                made.backward(made(*micro_batch(0, 0)) * sign)
                made.step()
        return windows


def test_without_a_signal_nothing_grows(ranks: Ranks) -> None:
    assert ranks.run(without_signal) == [[1, 1, 1]] * WORLD


def in_a_pipeline() -> tuple[list[int], bool]:
    from deepspeed.pipe import PipelineModule

    def made_with(accumulation: int, growth: dict[str, Any] | None) -> Any:
        torch.manual_seed(3)
        layers = [nn.Linear(4, 4), nn.Linear(4, 4)]
        model = PipelineModule(layers=layers, num_stages=WORLD, loss_fn=nn.MSELoss())
        more = {"batch_growth": growth} if growth else {}
        return engine(entries(1, "AdamW", gradient_accumulation_steps=accumulation, **more), model)

    def pairs(number: int) -> Any:
        while True:
            yield micro_batch(number, 0)
            number += 1

    with made_with(2, GROWTH | {"largest": 5, "factor": 1e6}) as made:
        number, windows, losses = 0, [], []
        for _ in range(4):
            windows.append(made.gradient_accumulation_steps())
            losses.append(float(made.train_batch(pairs(number))))
            number += windows[-1]
        grown_to = [p.detach().clone() for p in made.module.parameters()]
    with made_with(2, None) as made:
        number, again = 0, []
        for window in windows:
            made.set_train_batch_size(window * MICRO_BATCH)
            again.append(float(made.train_batch(pairs(number))))
            number += window
        alike = all(torch.equal(p, q) for p, q in zip(made.module.parameters(), grown_to, strict=True))
    return windows, alike and losses == again


def test_a_pipeline_grows_between_its_batches(ranks: Ranks) -> None:
    for windows, is_alike in ranks.run(in_a_pipeline):
        assert windows[0] == 2 and len(set(windows)) > 1
        assert is_alike


@pytest.mark.full
@pytest.mark.parametrize("optimizer", ["AdamW", "LENA", "Muon"])
def test_the_example(optimizer: str) -> None:
    told = launch(str(EXAMPLES / "grow_batch.py"), "--samples", "256", "--factor", "1000", "--optimizer", optimizer)
    assert re.search(r"\n\d+ updates, where 2 micro-batches each would take 3\d: an update of \d+ micro-batches", told)
    assert "; 4 micro-batches next" in told
