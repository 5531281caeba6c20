"""`ds_lena.watch` under DeepSpeed: right numbers for any optimizer, and weights that do not know of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import ds_lena
from benchmarks.footprint import Collectives
from ds_lena.integrations.transformers import NoiseScaleCallback
from tests.helpers.marks import full, rest
from tests.integrations import _hf_growth
from tests.integrations._engines import Net, engine, muon_in_eager, train
from tests.integrations._engines import config as lena_config
from tests.integrations._ranks import WORLD, Ranks

UPDATES, ACCUMULATION = 4, 2
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
    "SGD": {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9}},
    "Muon": {"type": "Muon", "params": {"lr": 0.01, "weight_decay": 0.01, "torch_adam": True}},
    "FusedAdam": {"type": "AdamW", "params": {"lr": 0.01}},  # DeepSpeed's own, which it compiles for the CPU too
    "client": {},
}


def micro_batch(update: int, micro: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1 + 1000 * update + 10 * micro + rank)
    return torch.randn(2, 4, generator=generator), torch.randn(2, 4, generator=generator)


def config(stage: int, optimizer: str, precision: str = "fp32", offload: bool = False, **more: Any) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 300, "stage3_param_persistence_threshold": 0}
    if optimizer == "Muon":
        zero["reduce_scatter"] = False  # DeepSpeed wants it for Muon at ZeRO 3
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    entries: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 0.5,
        "steps_per_print": 10**9,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if precision != "fp32":
        entries["bf16"] = {"enabled": True}
        entries["data_types"] = {"grad_accum_dtype": "fp32" if precision == "bf16-fp32" else "bf16"}
    if OPTIMIZERS[optimizer]:
        entries["optimizer"] = OPTIMIZERS[optimizer]
    return entries | more


@contextmanager
def stock(entries: dict[str, Any], model: nn.Module | None = None) -> Iterator[Any]:
    model = Net() if model is None else model
    client = None if "optimizer" in entries else torch.optim.AdamW(model.parameters(), lr=0.01)
    with muon_in_eager(entries):
        made, *_ = deepspeed.initialize(
            model=model,
            optimizer=client,
            model_parameters=None if client else list(model.parameters()),
            config=entries,
        )
        try:
            yield made
        finally:
            made.destroy()


def weights(made: Any) -> dict[str, Tensor]:
    named = dict(made.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values())):
        return {name: p.detach().double().clone() for name, p in named.items()}


def update_of(made: Any, update: int, micros: int = ACCUMULATION) -> None:
    for micro in range(micros):
        made.backward(made(*micro_batch(update, micro, torch.distributed.get_rank())))
        made.step()


def expected(at: dict[str, Tensor], update: int) -> dict[str, tuple[float, float]]:
    """Noise and signal of each tensor at these weights, in float64, by their definitions."""
    twin = Net().double()
    twin.load_state_dict(at)
    gradients: list[list[Tensor]] = []
    for micro in range(ACCUMULATION):
        for rank in range(WORLD):
            inputs = (x.double() for x in micro_batch(update, micro, rank))
            gradients.append(list(torch.autograd.grad(twin(*inputs), list(twin.parameters()))))
    n = len(gradients)
    found = {}
    for (name, _), each in zip(twin.named_parameters(), zip(*gradients, strict=True), strict=True):
        stacked = torch.stack(list(each))
        mean = stacked.mean(0)
        noise = float((stacked - mean).square().sum() / (n - 1))  # the unbiased variance
        found[name] = noise, float(mean.square().sum()) - noise / n
    return found


def worst_error(stage: int, optimizer: str, offload: bool) -> tuple[float, float]:
    """The largest error of a tensor's noise and signal, relative to both, and whether the model's are their sums."""
    averages: dict[str, list[float]] = {}
    weight = 0.0
    with stock(config(stage, optimizer, offload=offload)) as made:
        watch = ds_lena.watch(made, smoothing=0.5)
        for update in range(UPDATES):
            for name, values in expected(weights(made), update).items():
                old = averages.get(name, [0.0, 0.0])
                averages[name] = [0.5 * a + 0.5 * value for a, value in zip(old, values, strict=True)]
            weight = 0.5 * weight + 0.5
            update_of(made, update)
        report = watch.report()
        assert report == ds_lena.report(made)
    assert (report["update"], report["n"]) == (UPDATES, WORLD * ACCUMULATION)
    assert (report["micro_batches"], report["samples"]) == (4 * UPDATES, 8 * UPDATES)
    errors = []
    for name, (noise, signal) in averages.items():
        layer = report["layers"][name]
        noise, signal = noise / weight, signal / weight
        errors += [abs(layer["noise"] - noise), abs(layer["signal"] - signal)]
        errors[-2:] = [error / (noise + abs(signal)) for error in errors[-2:]]
    of_model = sum(noise for noise, _ in averages.values()) / sum(signal for _, signal in averages.values())
    return max(errors), abs(report["noise_scale"] / of_model - 1)


RIGHT = [
    *((stage, "client", False) for stage in range(4)),
    (2, "AdamW", True),
    *((stage, "Muon", False) for stage in (0, 1, 3)),
    *full(
        [
            *((2, "Muon", False), (1, "Muon", True), (3, "Muon", True)),
            *((1, "AdamW", True), (3, "AdamW", True), (2, "SGD", False), (0, "SGD", False)),
            *((0, "FusedAdam", False), (2, "FusedAdam", False)),
        ]
    ),
]


@pytest.mark.parametrize(("stage", "optimizer", "offload"), RIGHT)
def test_noise_and_signal_are_those_of_float64(ranks: Ranks, stage: int, optimizer: str, offload: bool) -> None:
    for of_layers, of_model in ranks.run(worst_error, stage, optimizer, offload):
        assert of_layers < 1e-5
        assert of_model < 1e-4


def weights_with_and_without(stage: int, optimizer: str, precision: str, offload: bool) -> bool:
    found = []
    for is_watched in (True, False):
        with stock(config(stage, optimizer, precision, offload)) as made:
            watch = ds_lena.watch(made) if is_watched else None
            for update in range(3):
                update_of(made, update)
            found.append(weights(made))
            assert watch is None or watch.report()["update"] == 3
    return all(torch.equal(found[0][name], found[1][name]) for name in found[0])


EVERY = product((1, 2, 3), ("AdamW", "Muon"), ("fp32", "bf16", "bf16-fp32"), (False, True))
EQUAL = rest(
    [*EVERY, (0, "FusedAdam", "bf16", False)],
    [
        *((stage, "client", "fp32", False) for stage in (0, 2)),
        (0, "AdamW", "bf16", False),
        (1, "Muon", "bf16", False),
        (1, "AdamW", "bf16-fp32", False),
        (3, "Muon", "bf16", False),
        (2, "AdamW", "bf16-fp32", True),
        (3, "AdamW", "bf16", True),
    ],
)


@pytest.mark.parametrize(("stage", "optimizer", "precision", "offload"), EQUAL)
def test_the_weights_do_not_know_of_it(ranks: Ranks, stage: int, optimizer: str, precision: str, offload: bool) -> None:
    assert ranks.run(weights_with_and_without, stage, optimizer, precision, offload) == [True] * WORLD


class Line(nn.Module):
    """Its gradient is the mean of the samples, wherever the weights are: noise and signal are known."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3000))
        self.rest = nn.Parameter(torch.zeros(1000))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ torch.cat((self.weight, self.rest))).mean()


def known_noise(stage: int, offload: bool) -> dict[str, Any]:
    with stock(config(stage, "client", offload=offload), Line()) as made:
        watch = ds_lena.watch(made)
        generator = torch.Generator().manual_seed(5 + torch.distributed.get_rank())
        for _ in range(60):
            for _ in range(ACCUMULATION):
                made.backward(made(0.25 + torch.randn(2, 4000, generator=generator)))
                made.step()
        return watch.report()


@pytest.mark.parametrize(("stage", "offload"), [(0, False), (1, False), (2, False), (3, False), (2, True)])
def test_a_known_noise_scale_is_found_within_2_percent(ranks: Ranks, stage: int, offload: bool) -> None:
    """Variance 1 and mean 1/4 in each place: with 2 samples the noise is 2000, the signal 250, the noise scale 8."""
    for report in ranks.run(known_noise, stage, offload):
        assert report["noise_scale"] == pytest.approx(8, rel=0.02)
        assert report["noise"] == pytest.approx(2000, rel=0.02)
        assert report["noise_scale_low"] < 8 < report["noise_scale_high"]
        assert report["noise_scale_samples"] == 2 * report["noise_scale"]
        assert report["layers"]["rest"]["noise_scale"] == pytest.approx(8, rel=0.05)
        assert report["efficiency"] == pytest.approx((8 + 1) / (8 + 4), rel=0.02)


def test_hf_trainer_needs_one_line(hf_run: Callable[[str], list[Any]]) -> None:
    """Under DeepSpeed and in DDP, which train alike: the last window of an epoch has one micro-batch on each rank."""
    reports = []
    for way in ("watched", "watched in DDP"):
        (first, plain), (second, _) = hf_run(way)
        assert first["report"] == second["report"]
        assert first["weights"] == plain["weights"]
        names = {name for log in first["logs"] for name in log if name.startswith("lena/")}
        assert {"lena/gain", "lena/noise_scale_low", "lena/efficiency"} <= names
        assert (first["report"]["samples"], first["report"]["update"], first["report"]["n"]) == (56, 8, 2)
        reports.append(first["report"])
    for key in ("noise", "signal"):
        assert reports[0][key] == pytest.approx(reports[1][key], rel=1e-3)


# -- how it is started, and what it says ------------------------------------------------------------------------------


def by_entry(folder: str) -> tuple[dict[str, Any], list[str]]:
    entry = {"layer": "block", "tokens_per_sample": 16, "log": f"{folder}/noise.jsonl", "log_every": 2}
    monitor = {"enabled": True, "output_path": folder, "job_name": "run"}
    with stock(config(1, "AdamW", noise_scale=entry, csv_monitor=monitor)) as made:
        update_of(made, 0)
        with Collectives() as calls:
            update_of(made, 1)
        with_it = len(calls.names)
        made.ds_lena_watch.close()
        with Collectives() as calls:
            update_of(made, 2)
        return ds_lena.report(made), [f"{with_it - len(calls.names)}"]


def test_an_entry_of_the_json_is_enough_and_costs_one_collective(ranks: Ranks, tmp_path: Path) -> None:
    (first, collectives), (second, _) = ranks.run(by_entry, str(tmp_path))
    assert first == second
    assert set(first["layers"]) == {f"{side}.{i}" for side in ("left", "right") for i in (0, 2, 4)}
    assert first["noise_scale_tokens"] == 32 * first["noise_scale"]
    assert collectives == ["1"]
    assert first["update"] == 2, "it was closed before the third"
    lines = [json.loads(line) for line in (tmp_path / "noise.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [2]
    assert lines[0]["layers"].keys() == first["layers"].keys()
    written = {file.stem for file in tmp_path.rglob("*.csv")}
    for name in ("gain", "noise_scale", "noise_scale_samples", "noise_scale_tokens", "efficiency"):
        assert any(stem.endswith(f"lena_{name}") for stem in written), (name, written)


def kept(folder: str, stage: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The report of four updates, of which the last two are made again by another engine from a checkpoint."""
    with stock(config(stage, "AdamW", noise_scale={})) as made:
        for update in range(UPDATES):
            update_of(made, update)
            if update == 1:
                made.save_checkpoint(folder, client_state={"mine": 1})
        reports = [ds_lena.report(made)]
    with stock(config(stage, "AdamW")) as made:
        ds_lena.watch(made).close()
        watch = ds_lena.watch(made)
        _, client_state = made.load_checkpoint(folder)
        for update in range(2, UPDATES):
            update_of(made, update)
        return [*reports, watch.report()], {
            key: client_state[key] for key in client_state if "ds_lena" in key or key == "mine"
        }


@pytest.mark.parametrize("stage", rest([0, 2, 3], [2]))
def test_a_checkpoint_keeps_what_it_remembers(ranks: Ranks, tmp_path: Path, stage: int) -> None:
    for (unbroken, resumed), client_state in ranks.run(kept, str(tmp_path), stage):
        assert resumed == unbroken
        assert client_state == {"mine": 1}


def test_a_resumed_trainer_goes_on_with_what_it_remembers(tmp_path: Path) -> None:
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 2, "use_cpu": True}

    def trained(max_steps: int, checkpoint: str | None = None) -> dict[str, Any]:
        args = TrainingArguments(str(tmp_path), max_steps=max_steps, report_to=[], disable_tqdm=True, **options)
        trainer = Trainer(_hf_growth.model(0), args, train_dataset=_hf_growth.Tokens())
        NoiseScaleCallback.add_to(trainer)
        trainer.train(resume_from_checkpoint=checkpoint)
        return ds_lena.report(trainer)

    unbroken = trained(4)
    assert trained(4, str(tmp_path / "checkpoint-2")) == unbroken
    assert unbroken["update"] == 4


def of_lena() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    with engine(lena_config(2)) as made:
        watch = ds_lena.watch(made, tokens_per_sample=4)
        assert ds_lena.watch(made, tokens_per_sample=4) is watch
        train(made, range(3))
        return watch.report(), ds_lena.report(made), made.basic_optimizer.state_dict()["lena"]["tally"]


def test_it_shows_what_a_lena_measures(ranks: Ranks) -> None:
    for mine, its, tally in ranks.run(of_lena):
        assert mine["noise_scale"] == its["noise_scale"]
        assert mine["noise_scale_tokens"] == mine["noise_scale"] * 2 * 4
        assert {name: layer["noise"] for name, layer in mine["layers"].items()} == {
            name: layer["noise"] for name, layer in its["layers"].items()
        }
        assert mine["micro_batches"] == tally["micro_batches"] == 3 * its["n"]


class Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())


def told_of_muon(stage: int) -> tuple[list[str], list[str]]:
    """What is told at the start, and after some updates."""
    messages = Messages()
    logging.getLogger("ds_lena").addHandler(messages)
    try:
        with stock(config(stage, "Muon", "bf16-fp32") | {"zero_optimization": {"stage": stage}}) as made:
            watch = ds_lena.watch(made)
            at_start = list(messages.told)
            for update in range(3):
                update_of(made, update)
            watch.report()
        return at_start, messages.told[len(at_start) :]
    finally:
        logging.getLogger("ds_lena").removeHandler(messages)


def test_where_deepspeed_does_not_apply_muon_it_is_said(ranks: Ranks) -> None:
    at_start, later = ranks.run(told_of_muon, 1)[0]
    assert any("do not orthogonalize" in message or "does not orthogonalize" in message for message in at_start)
    assert not any("no gradient arrives" in message for message in later)


def test_a_gradient_that_deepspeed_loses_is_named(ranks: Ranks) -> None:
    at_start, later = ranks.run(told_of_muon, 2)[0]
    assert any("DeepSpeed loses the gradient" in message and "or ZeRO 3. A" in message for message in at_start)
    assert any("no gradient arrives at" in message for message in later)


def refusal(keys: dict[str, Any], more: dict[str, Any], begun: bool = False, differs: bool = False) -> str:
    try:
        with stock(config(1, "Muon" if "differences" in keys else "AdamW", **more)) as made:
            if begun:
                made.backward(made(*micro_batch(0, 0, torch.distributed.get_rank())))
                made.step()
            ds_lena.watch(made, **({} if differs and torch.distributed.get_rank() else keys))
    except ds_lena.LenaError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("keys", "more", "message"),
    [
        ({"differences": True}, {}, "leaves no gradient to compare with"),
        ({"micro_batch_size": 3}, {}, '"micro_batch_size": 3'),
        ({"layer": "block"}, {"noise_scale": {"layer": "model"}}, "watched already, with other keys"),
        ({}, {"noise_scale": True}, "an object of keys"),
        ({}, {"noise_scale": {"smoothness": 1}}, 'Did you mean "smoothing"?'),
        ({}, {"gradient_allreduce_op": "sum"}, 'ds_lena.watch does not support "gradient_allreduce_op": "sum"'),
    ],
)
def test_what_is_refused(ranks: Ranks, keys: dict[str, Any], more: dict[str, Any], message: str) -> None:
    for told in ranks.run(refusal, keys, more):
        assert message in told


def test_the_same_error_is_told_on_every_rank(ranks: Ranks) -> None:
    wrong = ranks.run(refusal, {"layer": "row"}, {}, False, True)
    begun = ranks.run(refusal, {}, {}, True)
    for told, message in (
        (wrong, "\"layer\": 'row' is not allowed"),
        (begun, "1 of 2 micro-batches of an update are done"),
    ):
        assert told[0] == told[1] and message in told[0]


def by_entry_alone() -> tuple[bool, list[str]]:
    with stock(config(1, "AdamW", noise_scale={"layer": "model"})) as made:
        watch = made.ds_lena_watch
        is_the_same = ds_lena.watch(made) is watch is ds_lena.watch(made, layer="model")
        return is_the_same, list(watch.report()["layers"])


def test_an_entry_has_the_keys_and_a_call_none(ranks: Ranks) -> None:
    for is_the_same, layers in ranks.run(by_entry_alone):
        assert is_the_same and layers == ["model"]


def skipped() -> dict[str, Any]:
    with stock(config(2, "AdamW", "bf16")) as made:
        watch = ds_lena.watch(made)
        update_of(made, 0)
        before = watch.report()
        for micro in range(ACCUMULATION):
            made.backward(made(*micro_batch(1, micro, 0)) * float("inf"))
            made.step()
        after = watch.report()
        return {key: (before[key], after[key]) for key in ("update", "skipped", "noise_scale", "micro_batches")}


def test_an_update_that_is_skipped_leaves_nothing_but_a_count(ranks: Ranks) -> None:
    for found in ranks.run(skipped):
        assert found["update"] == (1, 1) and found["skipped"] == (0, 1)
        assert found["noise_scale"][0] == found["noise_scale"][1]
        assert found["micro_batches"] == (4, 4)
