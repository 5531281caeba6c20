"""Saving and loading through DeepSpeed: a resumed run is the unbroken run, bit for bit."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import ds_lena
from tests.helpers.marks import rest
from tests.integrations._engines import Net, config, engine, moved, said, stock_engine, train
from tests.integrations._ranks import WORLD, Ranks

SAVED_AFTER, UPDATES = 3, 8  # the cap ends the warm-ups after update 5 of the 20 that are planned
LAYOUTS = [
    (stage, precision, base)
    for stage, precision, base in product(range(4), ("fp32", "bf16", "bf16-fp32"), ("adamw", "sgd", "lamb"))
    if (stage, precision) != (0, "bf16-fp32")
]
LAYOUTS += product((1, 2, 3), ("fp16", "fp32 + offload", "bf16 + offload"), ("adamw", "lamb"))
DEFAULT = [
    *((0, "fp32", "adamw"), (0, "bf16", "adamw"), (1, "fp32", "sgd"), (1, "bf16", "lamb"), (1, "bf16-fp32", "adamw")),
    *((2, "fp32", "adamw"), (2, "bf16-fp32", "sgd"), (3, "fp32", "lamb"), (3, "bf16", "adamw")),
    *((2, "fp16", "lamb"), (3, "fp16", "adamw"), (1, "bf16 + offload", "adamw"), (3, "fp32 + offload", "lamb")),
]  # every class of wrapper with two rules at least
SHORT = (2, 2, 1, 1)  # micro-batches: the windows before and after the checkpoint are short
DECAY = {"type": "WarmupDecayLR", "params": {"warmup_min_lr": 0.01, "warmup_max_lr": 0.01, "total_num_steps": 20}}


def resume(
    folder: str, stage: int, precision: str, lena: dict[str, Any], micros: tuple[int, ...] = (2,), **more: Any
) -> dict[str, Any]:
    """Train with a checkpoint on the way, load it into other weights, and train the rest again."""
    entries = config(stage, precision, lena, **more)
    with engine(entries) as unbroken:
        train(unbroken, range(SAVED_AFTER), micros)
        saved = ds_lena.report(unbroken)
        unbroken.save_checkpoint(folder)
        train(unbroken, range(SAVED_AFTER, UPDATES), micros)
        end, weights = ds_lena.report(unbroken), moved(unbroken)
    with engine(entries, Net(seed=1)) as resumed:
        resumed.load_checkpoint(folder)
        loaded = ds_lena.report(resumed)
        train(resumed, range(SAVED_AFTER, UPDATES), micros)
        same = [torch.equal(a, b) for a, b in zip(weights, moved(resumed), strict=True)]
        return {"saved": saved, "loaded": loaded, "end": end, "resumed end": ds_lena.report(resumed), "same": same}


def is_the_unbroken_run(result: dict[str, Any]) -> bool:
    assert result["loaded"] == result["saved"]
    assert result["resumed end"] == result["end"]
    assert result["end"]["update"] == UPDATES
    return all(result["same"])


@pytest.mark.parametrize(("stage", "precision", "base"), rest(LAYOUTS, DEFAULT))
def test_a_resumed_run_is_the_unbroken_run(ranks: Ranks, tmp_path: Path, stage: int, precision: str, base: str) -> None:
    for result in ranks.run(resume, str(tmp_path), stage, precision, {"base": base}):
        warming_up = [layer["warmup"] < 1 for layer in result["saved"]["layers"].values()]
        assert any(warming_up) and not any(layer["warmup"] < 1 for layer in result["end"]["layers"].values())
        assert is_the_unbroken_run(result)


@pytest.mark.parametrize("stage", rest(range(4), [1]))
def test_it_is_also_after_a_window_with_fewer_micro_batches(ranks: Ranks, tmp_path: Path, stage: int) -> None:
    for result in ranks.run(resume, str(tmp_path), stage, "fp32", {}, SHORT):
        assert (result["saved"]["n"], result["end"]["n"]) == (2, 2)
        assert is_the_unbroken_run(result)


@pytest.mark.parametrize("stage", rest(range(4), [2]))
def test_it_is_also_with_a_scheduler_that_knows_the_length_of_the_run(ranks: Ranks, tmp_path: Path, stage: int) -> None:
    for result in ranks.run(resume, str(tmp_path), stage, "fp32", {"total_steps": None}, scheduler=DECAY):
        assert is_the_unbroken_run(result)


@pytest.mark.parametrize("layer", ["module", "block", "model"])
def test_it_is_also_with_larger_layers(ranks: Ranks, tmp_path: Path, layer: str) -> None:
    for result in ranks.run(resume, str(tmp_path), 2, "fp32", {"layer": layer}):
        assert is_the_unbroken_run(result)


def test_it_is_also_with_the_authors_variant(ranks: Ranks, tmp_path: Path) -> None:
    for result in ranks.run(resume, str(tmp_path), 2, "fp32", {"variant": "authors-code", "smoothing": None}):
        assert is_the_unbroken_run(result)


def planned_after_a_change(folder: str) -> float:
    """Base-batch iterations of a run of 20 updates that resumes with twice the accumulation, and a short window."""
    with engine(config(2)) as before:
        train(before, range(SAVED_AFTER))
        before.save_checkpoint(folder)
    with engine(config(2, gradient_accumulation_steps=4)) as after:
        after.load_checkpoint(folder)
        train(after, range(SAVED_AFTER, SAVED_AFTER + 1), (3,))
        return after.basic_optimizer.state_dict()["lena"]["planned"]


def test_the_rest_of_a_run_is_planned_for_the_micro_batches_that_are_configured(ranks: Ranks, tmp_path: Path) -> None:
    left = 20 - SAVED_AFTER
    assert ranks.run(planned_after_a_change, str(tmp_path)) == [SAVED_AFTER * 4.0 + left * 8.0] * WORLD


def planned_by(micros: tuple[int, ...], folder: str, **entries: Any) -> list[float]:
    """H after each of three updates with as many micro-batches on a rank, and after three more that follow a resume."""
    found = []
    for begin in (0, 3):
        with engine(config(2, **entries)) as made:
            if begin:
                made.load_checkpoint(folder)
            for update in range(begin, begin + 3):
                train(made, [update], (*micros, *micros)[update - begin :][:1] * (update + 1))
                found.append(made.basic_optimizer.state_dict()["lena"]["planned"])
            made.save_checkpoint(folder)
    return found


@pytest.mark.parametrize(
    ("accumulation", "micros", "planned"),
    [
        (8, (3, 8, 8), [20 * 16.0] * 6),  # as configured, though the first window is short
        (1, (8, 8, 3), [20 * 16.0] * 6),  # the caller's boundaries make windows of 8
        (1, (3, 8, 8), [20 * 6.0, *[6 + 19 * 16.0] * 5]),
    ],
)
def test_one_short_window_plans_nothing(
    ranks: Ranks, tmp_path: Path, accumulation: int, micros: tuple[int, ...], planned: list[float]
) -> None:
    found = ranks.run(planned_by, micros, str(tmp_path), gradient_accumulation_steps=accumulation)
    assert found == [planned] * WORLD


def gains_after_a_change(folder: str, stage: int, before: int, after: int) -> dict[str, tuple[float, float]]:
    """The gain of each layer at the first update with another number of micro-batches, and the predicted one."""
    keys = {"lr": 1e-9, "smoothing": None, "max_relative_gain": None, "warmup": "none"}
    with engine(config(stage, lena=keys, gradient_accumulation_steps=before)) as made:
        train(made, range(250), (before,))
        made.save_checkpoint(folder)
        layers = ds_lena.report(made)["layers"]
    with engine(config(stage, lena=keys, gradient_accumulation_steps=after), Net(seed=1)) as made:
        made.load_checkpoint(folder)
        train(made, range(250, 251), (after,))
        found = ds_lena.report(made)
    n, gains = found["n"], {}
    for name, layer in layers.items():
        noise, signal = layer["noise"], max(layer["signal"], 0.0)
        gains[name] = (found["layers"][name]["gain"], (noise + signal) / (noise / n + signal))
    assert n == after * WORLD
    return gains


@pytest.mark.parametrize(("before", "after"), rest([(2, 4), (4, 2)], [(2, 4)]))
def test_the_gain_right_after_a_change_of_n_is_the_predicted_one(
    ranks: Ranks, tmp_path: Path, before: int, after: int
) -> None:
    """On data that stays the same, to within 1% at once."""
    for gains in ranks.run(gains_after_a_change, str(tmp_path), 2, before, after):
        for found, predicted in gains.values():
            assert found == pytest.approx(predicted, rel=0.01)
        assert any(found > 1.2 for found, _ in gains.values())


def rewind(folder: str, stage: int) -> list[bool]:
    """Whether an engine that loads its own earlier checkpoint does the same again: its report, and tensor by tensor."""
    with engine(config(stage)) as made:
        train(made, range(SAVED_AFTER))
        made.save_checkpoint(folder)
        train(made, range(SAVED_AFTER, UPDATES))
        report, weights = ds_lena.report(made), moved(made)
        made.load_checkpoint(folder)
        train(made, range(SAVED_AFTER, UPDATES))
        same = [torch.equal(a, b) for a, b in zip(weights, moved(made), strict=True)]
        return [ds_lena.report(made) == report, *same]


@pytest.mark.parametrize("stage", rest(range(4), [0, 1, 3]))
def test_an_engine_can_go_back_to_its_own_checkpoint(ranks: Ranks, tmp_path: Path, stage: int) -> None:
    for same in ranks.run(rewind, str(tmp_path), stage):
        assert all(same)


def save(folder: str, stage: int, width: int, depth: int) -> list[str]:
    """The layer names of a model whose checkpoint is written to `folder`."""
    with engine(config(stage), Net(width=width, depth=depth)) as made:
        train(made, range(1))
        made.save_checkpoint(folder)
        return list(ds_lena.report(made)["layers"])


def lena_entries(folder: Path) -> list[Any]:
    """Everything that stands under "lena" in the files of a checkpoint."""
    found = []

    def search(value: Any) -> None:
        if isinstance(value, dict):
            found.extend(inside for key, inside in value.items() if key == "lena")
            for inside in value.values():
                search(inside)
        elif isinstance(value, (list, tuple)):
            for inside in value:
                search(inside)

    for path in folder.rglob("*.pt"):
        search(torch.load(path, weights_only=False, map_location="cpu"))
    return found


def numbers_in(value: Any) -> int:
    if isinstance(value, dict):
        return sum(numbers_in(inside) for inside in value.values())
    if isinstance(value, list):
        return sum(numbers_in(inside) for inside in value)
    return 1


@pytest.mark.parametrize("stage", rest(range(4), [0, 1, 3]))
def test_lenas_part_is_plain_numbers_by_layer_name(ranks: Ranks, tmp_path: Path, stage: int) -> None:
    names = ranks.run(save, str(tmp_path), stage, width=8, depth=1)[0]
    entries = lena_entries(tmp_path)
    assert len(entries) == (1 if stage == 0 else 2), "one in every file that holds optimizer state"
    for entry in entries:
        assert list(entry["layers"]) == names
        assert json.loads(json.dumps(entry)) == entry


def test_its_size_grows_with_the_number_of_layers_and_not_with_theirs(ranks: Ranks, tmp_path: Path) -> None:
    count = {}
    for width, depth in [(8, 1), (64, 1), (8, 4)]:
        folder = tmp_path / f"{width}x{depth}"
        layers = len(ranks.run(save, str(folder), 2, width=width, depth=depth)[0])
        count[width, depth] = (layers, numbers_in(lena_entries(folder)[0]))
    assert count[64, 1] == count[8, 1]
    assert all(numbers <= 10 * layers + 20 for layers, numbers in count.values())


def load_a_checkpoint_of_adamw(folder: str, stage: int) -> tuple[list[str], int, int, bool]:
    """What was said, LENA's updates after loading and after training on, and whether the weights were loaded."""
    with stock_engine(config(stage)) as other:
        train(other, range(2))
        other.save_checkpoint(folder)
        weights = moved(other)
    with engine(config(stage), Net(seed=1)) as made, said() as messages:
        made.load_checkpoint(folder)
        fresh = ds_lena.report(made)["update"]
        same = all(torch.equal(a, b) for a, b in zip(weights, moved(made), strict=True))
        train(made, range(2))
        return messages, fresh, ds_lena.report(made)["update"], same


@pytest.mark.parametrize("stage", rest(range(4), [0, 1, 3]))
def test_a_checkpoint_of_adamw_keeps_its_moments_and_starts_lena_fresh(
    ranks: Ranks, tmp_path: Path, stage: int
) -> None:
    results = ranks.run(load_a_checkpoint_of_adamw, str(tmp_path), stage)
    for rank, (messages, fresh, after, same) in enumerate(results):
        assert ["no LENA state" in message for message in messages] == ([] if rank else [True])
        assert (fresh, after) == (0, 2)
        assert same


def load_with(folder: str, saved: dict[str, Any], loaded: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """What was said when a checkpoint of other keys was loaded, and the report then."""
    with engine(config(2, lena=saved)) as before:
        train(before, range(SAVED_AFTER))
        before.save_checkpoint(folder)
    with engine(config(2, lena=loaded), Net(seed=1)) as after, said() as messages:
        after.load_checkpoint(folder)
        report = ds_lena.report(after)
        train(after, range(1))
        return messages, report


def test_another_kind_of_layer_warns_and_starts_fresh(ranks: Ranks, tmp_path: Path) -> None:
    results = ranks.run(load_with, str(tmp_path), {"layer": "tensor"}, {"layer": "module"})
    (message,) = results[0][0]
    for _, report in results:
        assert "start fresh: ['left.0', " in message and "'left.0.weight'" in message and '"layer"' in message
        assert all(layer["state"] == 0 and layer["gain"] == 1 for layer in report["layers"].values())


def test_a_newly_excluded_parameter_warns_and_the_others_go_on(ranks: Ranks, tmp_path: Path) -> None:
    results = ranks.run(load_with, str(tmp_path), {}, {"exclude": ["left.0.bias"]})
    (message,) = results[0][0]
    for _, report in results:
        assert "left.0.bias" in message
        assert all(layer["state"] > 0 for layer in report["layers"].values())


def load_of_another_variant(folder: str) -> str:
    with engine(config(2)) as before:
        train(before, range(1))
        before.save_checkpoint(folder)
    with engine(config(2, lena={"variant": "authors-code", "smoothing": None})) as after:
        try:
            after.load_checkpoint(folder)
        except ds_lena.StateError as error:
            return str(error)
    return "loaded"


def test_a_checkpoint_of_another_variant_is_refused_on_every_rank(ranks: Ranks, tmp_path: Path) -> None:
    for message in ranks.run(load_of_another_variant, str(tmp_path)):
        assert '"variant": "default"' in message and '"authors-code"' in message
