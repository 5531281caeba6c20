"""A checkpoint goes to another number of ranks and another ZeRO stage: loaded bit for bit, and then the same run."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import ds_lena
from ds_lena.keys import BASES
from tests.helpers.marks import rest
from tests.integrations._engines import engine
from tests.integrations._ranks import Ranks
from tests.integrations._resharding import MORE, SAVED_AFTER, Model, differing, entries, groups, train, whole

ROUNDING = {"fp32": 1e-4, "bf16": 3e-2, "bf16-fp32": 3e-2, "fp16": 1e-2}
"""By how much three updates may differ, relatively: gradients of other ranks are added up in another order."""


Case = tuple[int, str, str]
Result = list[tuple[dict[str, Tensor], dict[str, Any]]]


def save(folder: str, stage: int, precision: str, base: str, **zero: Any) -> Result:
    """What was saved, and what the run came to afterwards: tensors and report."""
    model = Model()
    with engine(entries(stage, precision, base, zero), model, model_parameters=groups(model)) as made:
        train(made, range(SAVED_AFTER))
        made.save_checkpoint(folder)
        at_save = whole(made), ds_lena.report(made)
        train(made, range(SAVED_AFTER, SAVED_AFTER + MORE))
        return [at_save, (whole(made), ds_lena.report(made))]


def load(folder: str, stage: int, precision: str, base: str, **zero: Any) -> Result:
    """What was loaded into another model, which has been trained, and what the run came to afterwards."""
    model = Model(seed=1)
    with engine(entries(stage, precision, base, zero), model, model_parameters=groups(model)) as made:
        train(made, range(1))
        made.load_checkpoint(folder)
        loaded = whole(made), ds_lena.report(made)
        train(made, range(SAVED_AFTER, SAVED_AFTER + MORE))
        return [loaded, (whole(made), ds_lena.report(made))]


def check(saved: list[Result], loaded: list[Result], old: Case, new: Case) -> None:
    """Masters and state are the same, bit for bit, and so is the rest, unless the precision is another."""
    rounding = max(ROUNDING[case[1].split()[0]] for case in (old, new)) * (1 if old[1] == new[1] else 2)
    (at_save, report), (at_end, report_at_end) = saved[0]
    for (now, report_now), (end, report_then) in loaded:
        exact = {key for key in at_save if " " in key or old[1] == new[1]}
        assert exact.isdisjoint(differing(at_save, now))
        assert differing(at_save, now, rounding) == []
        assert report_now == report
        assert set(differing(at_end, end, rounding)) <= {"seen"}, "a rank of fewer sees more"
        assert report_then["update"] == report_at_end["update"] == SAVED_AFTER + MORE
        for name, layer in report_at_end["layers"].items():
            assert report_then["layers"][name]["gain"] == pytest.approx(layer["gain"], rel=100 * rounding)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """A single rank."""
    started = Ranks(tmp_path_factory.mktemp("one"), world=1)
    yield started
    started.stop()


BETWEEN_PRECISIONS = [
    ((1, "fp32", "adamw"), (1, "bf16", "adamw")),
    ((2, "bf16", "adamw"), (0, "fp32", "adamw")),
    ((0, "fp32", "lamb"), (0, "bf16", "lamb")),
    ((3, "bf16", "sgd"), (3, "fp32", "sgd")),
    ((3, "fp32", "adamw"), (1, "bf16-fp32", "adamw")),
    ((1, "bf16-fp32", "adamw"), (2, "fp16", "adamw")),
    ((3, "fp16", "adamw"), (2, "bf16", "adamw")),
]
CASES: list[tuple[Case, Case]] = [
    *(((old, "fp32", base), (new, "fp32", base)) for base in BASES for old, new in product(range(4), repeat=2)),
    *(((old, "bf16", "adamw"), (new, "bf16", "adamw")) for old, new in product(range(4), repeat=2)),
    *(((1, "bf16-fp32", "adamw"), (new, "bf16-fp32", "adamw")) for new in (1, 2, 3)),
    *(((old, "bf16-fp32", "adamw"), (1, "bf16-fp32", "adamw")) for old in (2, 3)),
    ((2, "fp32 + offload", "adamw"), (3, "fp32", "adamw")),
    ((3, "bf16", "adamw"), (1, "bf16 + offload", "adamw")),
    ((3, "fp32 + offload", "lamb"), (3, "fp32 + offload", "lamb")),
    ((2, "fp16", "adamw"), (3, "fp16", "adamw")),
    *BETWEEN_PRECISIONS,
]
"""(saved, loaded): ZeRO stage, precision, base rule."""
DEFAULT_TO_ONE: list[tuple[Case, Case]] = [
    ((2, "fp32", "adamw"), (2, "fp32", "adamw")),
    ((3, "bf16", "adamw"), (1, "bf16-fp32", "adamw")),
    ((0, "bf16", "lamb"), (3, "bf16", "lamb")),
]
DEFAULT_TO_TWO: list[tuple[Case, Case]] = [
    ((1, "bf16-fp32", "lars"), (2, "bf16", "lars")),
    ((3, "fp32", "sgd"), (0, "fp32", "sgd")),
    ((2, "bf16", "adamw"), (0, "fp32", "adamw")),
]
"""Every wrapper and every rule, saved and loaded, and another precision."""


def named(case: Case) -> str:
    return "-".join(map(str, case))


@pytest.mark.parametrize(("saved", "loaded"), rest(CASES, DEFAULT_TO_ONE), ids=named)
def test_from_two_ranks_to_one(ranks: Ranks, one: Ranks, tmp_path: Path, saved: Case, loaded: Case) -> None:
    check(ranks.run(save, str(tmp_path), *saved), one.run(load, str(tmp_path), *loaded), saved, loaded)


@pytest.mark.parametrize(("saved", "loaded"), rest(CASES, DEFAULT_TO_TWO), ids=named)
def test_from_one_rank_to_two(ranks: Ranks, one: Ranks, tmp_path: Path, saved: Case, loaded: Case) -> None:
    check(one.run(save, str(tmp_path), *saved), ranks.run(load, str(tmp_path), *loaded), saved, loaded)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Four ranks, of which some own nothing of the small group."""
    started = Ranks(tmp_path_factory.mktemp("four"), world=4)
    yield started
    started.stop()


@pytest.mark.full
@pytest.mark.parametrize(
    ("saved", "loaded"), [((2, "fp32", "adamw"), (3, "fp32", "adamw")), ((1, "bf16", "lars"), (0, "bf16", "lars"))]
)
def test_between_two_ranks_and_four(ranks: Ranks, four: Ranks, tmp_path: Path, saved: Case, loaded: Case) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    check(ranks.run(save, str(there), *saved), four.run(load, str(there), *loaded), saved, loaded)
    check(four.run(save, str(back), *loaded), ranks.run(load, str(back), *saved), loaded, saved)


# -- one number of ranks, another order of memory ---------------------------------------------------------------------

REORDERED: list[tuple[int, str, dict[str, Any], dict[str, Any]]] = [
    (2, "fp32", {}, {"round_robin_gradients": True}),
    (1, "bf16", {"round_robin_gradients": True}, {}),
    (3, "fp32", {}, {"sub_group_size": 40}),
    (3, "fp32", {"sub_group_size": 40}, {"sub_group_size": 90}),
]


@pytest.mark.parametrize(("stage", "precision", "old", "new"), rest(REORDERED, [REORDERED[0], REORDERED[3]]))
def test_to_another_order_of_memory(
    ranks: Ranks, tmp_path: Path, stage: int, precision: str, old: dict[str, Any], new: dict[str, Any]
) -> None:
    case = stage, precision, "adamw"
    check(ranks.run(save, str(tmp_path), *case, **old), ranks.run(load, str(tmp_path), *case, **new), case, case)


@pytest.mark.full
def test_files_of_an_older_save_are_left_alone(ranks: Ranks, one: Ranks, tmp_path: Path) -> None:
    """By more ranks and at another stage, in the folder of the same tag."""
    old, new = (3, "fp32", "adamw"), (2, "fp32", "adamw")
    ranks.run(save, str(tmp_path), *old)
    check(one.run(save, str(tmp_path), *new), ranks.run(load, str(tmp_path), *old), new, old)
