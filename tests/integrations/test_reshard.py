"""A checkpoint goes to another number of ranks and another ZeRO stage: loaded bit for bit, and then the same run."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_lena
from ds_lena.keys import BASES
from tests.helpers.marks import rest
from tests.integrations._engines import engine
from tests.integrations._ranks import Ranks
from tests.integrations._resharding import MORE, SAVED_AFTER, Model, differing, entries, groups, train, whole
from tests.integrations._split import TwoParts

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


class TwoOfTwo:
    """An mpu of four ranks: 0 and 1 hold one model in two parts, 2 and 3 another replica."""

    def __init__(self) -> None:
        mine = dist.get_rank()
        pairs = {pair: dist.new_group(list(pair)) for pair in [(0, 1), (2, 3), (0, 2), (1, 3)]}
        (self.parts,) = (group for pair, group in pairs.items() if mine in pair and pair[1] - pair[0] == 1)
        (self.replicas,) = (group for pair, group in pairs.items() if mine in pair and pair[1] - pair[0] == 2)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith(("get_model", "get_data")):
            raise AttributeError(name)
        group = self.parts if "model" in name else self.replicas
        given = {"group": group, "size": dist.get_world_size(group), "rank": dist.get_rank(group)}
        return lambda: given[name.rpartition("_")[2]]


def in_parts(
    folder: str, stage: int, mpu: type[TwoOfTwo] | type[TwoParts], loads: bool
) -> tuple[dict[str, Tensor], Any]:
    model = Model(seed=int(loads))
    given = entries(stage, "fp32", "adamw", {}) | {"gradient_accumulation_steps": 2}
    with engine(given, model, mpu=mpu(), model_parameters=groups(model)) as made:
        replica = dist.get_rank(made.seq_data_parallel_group)
        if loads:
            made.load_checkpoint(folder)
        for micro in range(0 if loads else 4):
            generator = torch.Generator().manual_seed(10 * micro + replica)
            x, y = torch.randn(2, 2, 4, generator=generator).unbind()
            made.backward(made(x, y))
            made.step()
        if not loads:
            made.save_checkpoint(folder)
        return whole(made), ds_lena.report(made)


@pytest.mark.full
@pytest.mark.parametrize(("old", "new"), [(2, 1), (1, 3), (3, 3)])
def test_a_model_in_parts_goes_to_fewer_replicas(ranks: Ranks, four: Ranks, tmp_path: Path, old: int, new: int) -> None:
    saved, report = four.run(in_parts, str(tmp_path), old, TwoOfTwo, False)[0]
    for now, report_now in ranks.run(in_parts, str(tmp_path), new, TwoParts, True):
        assert differing(saved, now) == []
        assert report_now == report and report["update"] == 2


# -- memory -----------------------------------------------------------------------------------------------------------

SIDE = 2048  # of the one large weight
MEGABYTES = SIDE * SIDE * 4 / 2**20  # of its float32 values: master weights and each moment


class Large(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((SIDE, SIDE), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).square().mean()


def save_large(folder: str) -> None:
    with engine(entries(2, "fp32", "adamw", {}), Large()) as made:
        for _ in range(made.gradient_accumulation_steps()):
            made.backward(made(torch.ones(SIDE)))
            made.step()
        made.save_checkpoint(folder)


def load_large(folder: str, stage: int) -> tuple[float, float]:
    """By how many megabytes the memory in use grows while the checkpoint is loaded, at most, and what stays."""
    with engine(entries(stage, "fp32", "adamw", {}), Large()) as made:
        gc.collect()
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak is measured from here
        made.load_checkpoint(folder)
        peak = memory("VmHWM")
        gc.collect()
        return peak - before, memory("VmRSS") - before


def memory(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) / 1024


@pytest.mark.full
@pytest.mark.parametrize("stage", [2, 3])
def test_a_rank_holds_one_old_file_and_its_own_pieces(ranks: Ranks, four: Ranks, tmp_path: Path, stage: int) -> None:
    """Of four files, loaded by two ranks."""
    four.run(save_large, str(tmp_path))
    own, file, module = 3 * MEGABYTES / 2, 3 * MEGABYTES / 4, MEGABYTES
    for peak, _ in ranks.run(load_large, str(tmp_path), stage):
        # The moments are new in the engine, and DeepSpeed reads the module's file as a whole.
        assert peak < own + 2 / 3 * own + max(file, module) + 16


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


@pytest.mark.parametrize(("before", "after"), rest([(3, 2), (2, 0), (3, 0)], [(2, 0)]))
def test_files_of_an_older_save_are_left_alone(
    ranks: Ranks, one: Ranks, tmp_path: Path, before: int, after: int
) -> None:
    """By more ranks and at another stage, in the folder of the same tag."""
    old, new = (before, "fp32", "adamw"), (after, "fp32", "adamw")
    ranks.run(save, str(tmp_path), *old)
    check(one.run(save, str(tmp_path), *new), ranks.run(load, str(tmp_path), *old), new, old)


def save_new(folder: str, stage: int, precision: str, base: str) -> dict[str, Tensor]:
    """A checkpoint of an engine before its first update. Its base rule may have no state yet."""
    model = Model()
    with engine(entries(stage, precision, base, {}), model, model_parameters=groups(model)) as made:
        made.save_checkpoint(folder)
        return whole(made)


def load_new(folder: str, stage: int, precision: str, base: str) -> tuple[dict[str, Tensor], int]:
    """What was loaded, and how many updates there are after one more."""
    model = Model(seed=1)
    with engine(entries(stage, precision, base, {}), model, model_parameters=groups(model)) as made:
        made.load_checkpoint(folder)
        loaded = whole(made)
        train(made, range(1))
        return loaded, ds_lena.report(made)["update"]


NEW = [(stage, "fp32", base) for stage in range(4) for base in BASES] + [(1, "bf16-fp32", base) for base in BASES]


@pytest.mark.parametrize(("stage", "precision", "base"), rest(NEW, [(1, "bf16-fp32", "lars"), (2, "fp32", "adamw")]))
def test_a_checkpoint_before_the_first_update(
    ranks: Ranks, one: Ranks, tmp_path: Path, stage: int, precision: str, base: str
) -> None:
    case = stage, precision, base
    saved = ranks.run(save_new, str(tmp_path), *case)[0]
    for loaded, updates in (*ranks.run(load_new, str(tmp_path), *case), *one.run(load_new, str(tmp_path), *case)):
        weights = [key for key in saved if " " not in key]
        assert weights and all(torch.equal(saved[key], loaded[key]) for key in weights)
        assert updates == 1


@pytest.mark.parametrize("stage", rest([1, 2, 3], [2]))
def test_files_of_another_precision_in_the_folder_are_left_alone(
    ranks: Ranks, one: Ranks, tmp_path: Path, stage: int
) -> None:
    """Saved twice under one tag: the names of the files differ, and those of the first save stay."""
    for old, new in (("bf16", "fp32"), ("fp32", "bf16")):
        case = (stage, new, "adamw")
        folder = tmp_path / new
        ranks.run(save, str(folder), stage, old, "sgd")
        saved = ranks.run(save, str(folder), *case)
        check(saved, ranks.run(load, str(folder), *case), case, case)
        check(saved, one.run(load, str(folder), *case), case, case)


class Shaped(nn.Module):
    """A weight, a frozen weight and a buffer of these shapes."""

    def __init__(self, weight: tuple[int, ...], frozen: tuple[int, ...], buffer: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(weight))
        self.frozen = nn.Parameter(torch.ones(frozen), requires_grad=False)
        self.register_buffer("seen", torch.ones(buffer))

    def forward(self) -> Tensor:
        return self.weight.square().sum() + 0 * self.frozen.sum() + 0 * self.seen.sum()


def save_shaped(folder: str, stage: int) -> None:
    with engine(entries(stage, "fp32", "adamw", {}), Shaped((6, 4), (5, 3), 3)) as made:
        made.save_checkpoint(folder)


def load_shaped(folder: str, stage: int, *shapes: Any) -> str:
    with engine(entries(stage, "fp32", "adamw", {}), Shaped(*shapes)) as made:
        before = whole(made)
        try:
            made.load_checkpoint(folder)
        except ds_lena.StateError as error:
            assert all(torch.equal(value, before[name]) for name, value in whole(made).items())
            return str(error)
        return ""


SHAPES = {
    "weight": ((4, 6), (5, 3), 3),
    "frozen": ((6, 4), (3, 5), 3),
    "seen": ((6, 4), (5, 3), 4),
}


@pytest.mark.parametrize(("saved", "loaded"), rest(product(range(4), repeat=2), [(2, 2), (3, 1)]))
def test_another_shape_is_refused(ranks: Ranks, one: Ranks, tmp_path: Path, saved: int, loaded: int) -> None:
    ranks.run(save_shaped, str(tmp_path), saved)
    for name, shapes in SHAPES.items():
        for message in (
            *ranks.run(load_shaped, str(tmp_path), loaded, *shapes),
            *one.run(load_shaped, str(tmp_path), loaded, *shapes),
        ):
            assert message.startswith(f'LENA: "{name}" has the shape (') and "in this model. Load the" in message
    assert ranks.run(load_shaped, str(tmp_path), loaded, (6, 4), (5, 3), 3) == ["", ""]
