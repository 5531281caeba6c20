"""A checkpoint goes to another number of ranks and another ZeRO stage: loaded bit for bit, and then the same run."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_lena
from ds_lena.keys import BASES
from ds_lena.optimizer import controller_of
from tests.helpers.marks import rest
from tests.integrations._engines import Net, config, engine
from tests.integrations._ranks import Ranks

ROUNDING = {"fp32": 1e-4, "bf16": 3e-2, "bf16-fp32": 3e-2, "fp16": 1e-2}
"""By how much three updates may differ, relatively: gradients of other ranks are added up in another order."""
MICROS, SAVED_AFTER, MORE = 4, 3, 3  # micro-batches of all ranks in an update; updates


class Model(nn.Module):
    """Two towers, of which one begins with frozen weights, a weight that both share, and a buffer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.net = Net(seed, width=7)  # so that the ranks' parts have padding
        self.net.right[0].weight.requires_grad_(False)
        self.net.right[2].weight = self.net.left[2].weight
        self.register_buffer("seen", torch.tensor(float(seed)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        return self.net(x, y)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weights; biases with another learning rate and decay; three elements, of which some of four ranks get none."""
    named = dict(model.named_parameters())
    few = named.pop("net.right.4.bias")
    return [
        {"params": [p for name, p in named.items() if "bias" not in name]},
        {"params": [p for name, p in named.items() if "bias" in name], "lr": 3e-2, "weight_decay": 0.1},
        {"params": [few], "lr": 2e-2},
    ]


def train(engine: Any, updates: range) -> None:
    """The same micro-batches for any number of ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for update in updates:
        for micro in range(MICROS // world):
            generator = torch.Generator().manual_seed(100 * update + micro * world + rank)
            x, y = torch.randn(2, 2, 4, generator=generator).unbind()
            engine.backward(engine(x, y))
            engine.step()


def whole(engine: Any) -> dict[str, Tensor]:
    """Masters and state of every parameter, put together from all ranks, the model's own weights, and its buffer."""
    lena = engine.basic_optimizer
    binding = controller_of(lena).binding
    mine: list[tuple[str, int, Tensor]] = []
    for flat, segments in binding.layout.segments():
        for segment in segments:
            name = binding.placements[segment.parameter].name
            for key, value in {"master": flat, **lena.state[flat]}.items():
                piece = value.reshape(-1)[segment.start : segment.start + segment.length] if key != "step" else value
                mine.append((f"{name} {key}", segment.offset, piece.detach().reshape(-1).clone()))
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    is_copy = engine.zero_optimization_stage() == 0
    parts: dict[str, dict[int, Tensor]] = {}
    for key, offset, piece in (entry for rank in (gathered[:1] if is_copy else gathered) for entry in rank):
        parts.setdefault(key, {})[0 if key.endswith(" step") else offset] = piece
    found = {key: torch.cat([piece for _, piece in sorted(held.items())]) for key, held in parts.items()}
    import deepspeed

    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            found[name] = parameter.detach().clone().reshape(-1)
    return found | {"seen": engine.module.seen.clone()}


def entries(stage: int, precision: str, base: str, zero: dict[str, Any]) -> dict[str, Any]:
    made = config(stage, precision, {"base": base}, zero=zero)
    return made | {"gradient_accumulation_steps": MICROS // dist.get_world_size()}


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
    """What was loaded into another model, and what the run came to afterwards."""
    model = Model(seed=1)
    with engine(entries(stage, precision, base, zero), model, model_parameters=groups(model)) as made:
        made.load_checkpoint(folder)
        loaded = whole(made), ds_lena.report(made)
        train(made, range(SAVED_AFTER, SAVED_AFTER + MORE))
        return [loaded, (whole(made), ds_lena.report(made))]


def differing(a: Mapping[str, Tensor], b: Mapping[str, Tensor], rounding: float = 0.0) -> list[str]:
    assert a.keys() == b.keys()
    same = {key: torch.allclose(a[key].float(), b[key].float(), rtol=rounding, atol=rounding * 1e-2) for key in a}
    return [key for key, is_same in same.items() if not is_same]


def check(saved: list[Result], loaded: list[Result], rounding: float) -> None:
    (at_save, report), (at_end, report_at_end) = saved[0]
    for (now, report_now), (end, report_then) in loaded:
        assert differing(at_save, now) == []
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


Case = tuple[int, str, str]

CASES: list[tuple[Case, Case]] = [
    *(((old, "fp32", base), (new, "fp32", base)) for base in BASES for old, new in product(range(4), repeat=2)),
    *(((old, "bf16", "adamw"), (new, "bf16", "adamw")) for old, new in product(range(4), repeat=2)),
    *(((1, "bf16-fp32", "adamw"), (new, "bf16-fp32", "adamw")) for new in (1, 2, 3)),
    *(((old, "bf16-fp32", "adamw"), (1, "bf16-fp32", "adamw")) for old in (2, 3)),
]
"""(saved, loaded): ZeRO stage, precision, base rule."""
DEFAULT: list[tuple[Case, Case]] = [
    ((2, "fp32", "adamw"), (2, "fp32", "adamw")),
    ((3, "bf16", "adamw"), (1, "bf16-fp32", "adamw")),
    ((1, "bf16-fp32", "lars"), (2, "bf16", "lars")),
    ((0, "bf16", "lamb"), (3, "bf16", "lamb")),
    ((3, "fp32", "sgd"), (0, "fp32", "sgd")),
]  # every wrapper and every rule
OFFLOADED = [
    ((2, "fp32 + offload", "adamw"), (3, "fp32", "adamw")),
    ((3, "bf16", "adamw"), (1, "bf16 + offload", "adamw")),
    ((3, "fp32 + offload", "lamb"), (3, "fp32 + offload", "lamb")),
    ((2, "fp16", "adamw"), (3, "fp16", "adamw")),
]


def named(case: Case) -> str:
    return "-".join(map(str, case))


@pytest.mark.parametrize(("saved", "loaded"), rest([*CASES, *OFFLOADED], DEFAULT), ids=named)
def test_from_two_ranks_to_one(ranks: Ranks, one: Ranks, tmp_path: Path, saved: Case, loaded: Case) -> None:
    check(ranks.run(save, str(tmp_path), *saved), one.run(load, str(tmp_path), *loaded), ROUNDING[saved[1].split()[0]])


@pytest.mark.parametrize(("saved", "loaded"), rest([*CASES, *OFFLOADED], DEFAULT), ids=named)
def test_from_one_rank_to_two(ranks: Ranks, one: Ranks, tmp_path: Path, saved: Case, loaded: Case) -> None:
    check(one.run(save, str(tmp_path), *saved), ranks.run(load, str(tmp_path), *loaded), ROUNDING[saved[1].split()[0]])


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
    rounding = ROUNDING[saved[1]]
    check(ranks.run(save, str(there), *saved), four.run(load, str(there), *loaded), rounding)
    check(four.run(save, str(back), *loaded), ranks.run(load, str(back), *saved), rounding)


# -- one number of ranks, another order of memory ---------------------------------------------------------------------

REORDERED: list[tuple[int, str, dict[str, Any], dict[str, Any]]] = [
    (2, "fp32", {}, {"round_robin_gradients": True}),
    (1, "bf16", {"round_robin_gradients": True}, {}),
    (3, "fp32", {}, {"sub_group_size": 40}),
    (3, "fp32", {"sub_group_size": 40}, {"sub_group_size": 90}),
]


@pytest.mark.parametrize(("stage", "precision", "old", "new"), REORDERED)
def test_to_another_order_of_memory(
    ranks: Ranks, tmp_path: Path, stage: int, precision: str, old: dict[str, Any], new: dict[str, Any]
) -> None:
    case = (str(tmp_path), stage, precision, "adamw")
    check(ranks.run(save, *case, **old), ranks.run(load, *case, **new), ROUNDING[precision])


def test_files_of_an_older_save_are_left_alone(ranks: Ranks, one: Ranks, tmp_path: Path) -> None:
    """By more ranks and at another stage, in the folder of the same tag."""
    ranks.run(save, str(tmp_path), 3, "fp32", "adamw")
    newer = one.run(save, str(tmp_path), 2, "fp32", "adamw")
    check(newer, ranks.run(load, str(tmp_path), 3, "fp32", "adamw"), ROUNDING["fp32"])


# -- bad files --------------------------------------------------------------------------------------------------------


def refused(folder: str, stage: int) -> tuple[str, bool, int]:
    """The error of loading, whether every tensor stayed as it was, and the engine's count of updates."""
    model = Model(seed=1)
    with engine(entries(stage, "fp32", "adamw", {}), model, model_parameters=groups(model)) as made:
        train(made, range(1))
        before, message = whole(made), ""
        try:
            made.load_checkpoint(folder)
        except ds_lena.StateError as error:
            message = str(error)
        return message, differing(before, whole(made)) == [], made.global_steps


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = torch.load(path, weights_only=False)
    change(content["optimizer_state_dict"]["base_optimizer_state"])
    torch.save(content, path)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "of rank 1 is not there"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 3]), "cannot be read"),
    "text": (lambda path: path.write_text("a text"), "cannot be read"),
    "another pickle": (lambda path: torch.save([1, 2], path), "cannot be read"),
    "another save": (lambda path: edit(path, lambda base: base["lena"].update(update=2)), "different saves"),
    "no LENA": (lambda path: edit(path, lambda base: base.pop("lena")), "holds no LENA state"),
    "LENA a string": (lambda path: edit(path, lambda base: base.update(lena="text")), "holds no LENA state"),
    "NaN": (
        lambda path: edit(path, lambda base: next(iter(base["lena"]["layers"].values()))["averages"].append(math.nan)),
        '"averages" is [',
    ),
    "negative": (lambda path: edit(path, lambda base: base["lena"].update(update=-5)), '"update" is -5'),
    "no map": (lambda path: edit(path, lambda base: base["lena"].pop("pieces")), "cannot be read"),
    "a gap": (lambda path: edit(path, lambda base: base["lena"]["pieces"][0].pop()), "lacks elements"),
    "twice": (
        lambda path: edit(path, lambda base: base["lena"]["pieces"][0].append([*base["lena"]["pieces"][0][0]])),
        "twice",
    ),
    "foreign": (
        lambda path: edit(path, lambda base: base["lena"]["pieces"][0].append(["other.weight", 0, 1, 0])),
        '"other.weight", which this model does not train',
    ),
    "no moments": (lambda path: edit(path, lambda base: base["state"].pop(0)), 'lacks "exp_avg" of'),
    "one moment": (lambda path: edit(path, lambda base: base["state"][0].pop("exp_avg")), 'lacks "exp_avg" of'),
    "short": (
        lambda path: edit(path, lambda base: base["state"][0].update(exp_avg=torch.zeros(3))),
        'lacks "exp_avg" of',
    ),
}


@pytest.fixture(scope="module")
def good(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two ranks."""
    folder = tmp_path_factory.mktemp("good")
    ranks.run(save, str(folder), 2, "fp32", "adamw")
    return folder


@pytest.mark.parametrize("fault", BAD)
@pytest.mark.parametrize("stage", rest([1, 3], [3]))
def test_a_bad_file_is_named_by_every_rank_and_nothing_changes(
    ranks: Ranks, good: Path, tmp_path: Path, stage: int, fault: str
) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(good, folder)
    (file,) = folder.rglob("*zero_pp_rank_1_*optim_states.pt")
    spoil, told = BAD[fault]
    spoil(file)
    (message, is_kept, steps), other = ranks.run(refused, str(folder), stage)
    assert told in message and (file.name in message or fault in ("missing", "a gap"))
    assert message == other[0]
    assert is_kept and other[1] and steps == 1
