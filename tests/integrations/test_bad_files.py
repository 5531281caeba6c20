"""A damaged checkpoint is one error on every rank, which names the file and what to do, and nothing has changed."""

from __future__ import annotations

import math
import pickletools
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ds_lena
from ds_lena.optimizer import controller_of
from ds_lena.schedule import checkpoint
from tests.helpers.marks import rest
from tests.integrations._engines import engine
from tests.integrations._ranks import Ranks
from tests.integrations._resharding import Model, differing, entries, groups, train, whole

RANK_1 = "zero_pp_rank_1_mp_rank_00_optim_states.pt"


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    rewrite(path, lambda content: change(content["optimizer_state_dict"]["base_optimizer_state"]))


def edit_lena(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return lambda path: edit(path, lambda base: change(base["lena"]))


def edit_wrapper(**entries: Any) -> Callable[[Path], object]:
    """What the wrapper itself saves."""
    return lambda path: rewrite(path, lambda content: content["optimizer_state_dict"].update(entries))


def edit_states(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """The state of each tensor, in the files of both ranks."""

    def in_all(base: dict[str, Any]) -> None:
        for state in base["state"].values():
            change(state)

    return lambda path: [edit(file, in_all) for file in path.parent.glob("*optim_states.pt")]


def edit_everywhere(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """In the files of both ranks, so that they agree."""
    return lambda path: [edit_lena(change)(file) for file in path.parent.glob("*optim_states.pt")]


def edit_model(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """In the model file."""
    return lambda path: rewrite(path.with_name("mp_rank_00_model_states.pt"), change)


def first_layer(lena: dict[str, Any]) -> dict[str, Any]:
    return next(iter(lena["layers"].values()))


def swap(path: Path) -> None:
    other, aside = path.with_name(path.name.replace("rank_1", "rank_0")), path.with_suffix(".aside")
    path.rename(aside)
    other.rename(path)
    aside.rename(other)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    # what is done to the file of rank 1, and what the error says
    "missing": (Path.unlink, "of rank 1 is not there"),
    "empty": (lambda path: path.write_bytes(b""), f"{RANK_1} cannot be read"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 3]), "cannot be read"),
    "text": (lambda path: path.write_text("a text"), f"{RANK_1} cannot be read"),
    "another pickle": (lambda path: torch.save([1, 2], path), f"{RANK_1} cannot be read"),
    "another save": (edit_lena(lambda lena: lena.update(update=1)), "are of different saves"),
    "no LENA": (lambda path: edit(path, lambda base: base.pop("lena")), f"{RANK_1} holds no LENA state"),
    "LENA a string": (lambda path: edit(path, lambda base: base.update(lena="text")), "holds no LENA state"),
    "a key of a layer": (edit_lena(lambda lena: first_layer(lena).pop("gain")), '"gain" is nothing'),
    "a key": (edit_lena(lambda lena: lena.pop("variant")), '"variant" is nothing'),
    "NaN": (edit_lena(lambda lena: first_layer(lena).update(averages=[math.nan, 1.0])), '"averages" is [nan, 1.0]'),
    "one average": (edit_lena(lambda lena: first_layer(lena)["averages"].pop()), '"averages" is ['),
    "negative": (edit_everywhere(lambda lena: lena.update(update=-5)), '"update" is -5'),
    "newer": (edit_everywhere(lambda lena: lena.update(version=9)), "has version 9"),
    "another variant": (edit_everywhere(lambda lena: lena.update(variant="authors-code")), '"authors-code"'),
    "another base": (edit_everywhere(lambda lena: lena.update(base="sgd")), '"base": "sgd"'),
    "no map": (edit_lena(lambda lena: lena.pop("pieces")), f"{RANK_1} cannot be read"),
    "a gap": (edit_lena(lambda lena: lena["pieces"][0].pop()), "lacks elements"),
    "twice": (edit_lena(lambda lena: lena["pieces"][0].append([*lena["pieces"][0][0]])), "twice"),
    "a wild piece": (edit_lena(lambda lena: lena["pieces"][0].append(["x", 0.5, 1, 0])), "is not a piece"),
    "foreign": (
        edit_lena(lambda lena: lena["pieces"][0][0].__setitem__(0, "x.weight")),
        '"x.weight", which this model',
    ),
    "no moments": (lambda path: edit(path, lambda base: base["state"].pop(0)), f'{RANK_1} lacks "exp_avg" of'),
    "one moment": (lambda path: edit(path, lambda base: base["state"][0].pop("exp_avg")), 'lacks "exp_avg" of'),
    "short": (lambda path: edit(path, lambda base: base["state"][0].update(exp_avg=torch.zeros(3))), "exp_avg"),
    "no state": (lambda path: edit(path, lambda base: base["state"].clear()), f'{RANK_1} lacks "exp_avg" of'),
    "no moment anywhere": (edit_states(lambda state: state.pop("exp_avg")), 'lacks "exp_avg" of'),
    "whole numbers": (edit_states(lambda state: state.update(exp_avg=state["exp_avg"].long())), 'lacks "exp_avg" of'),
    "below 0 updates": (edit_states(lambda state: state.update(step=torch.tensor(-5.0))), "has had -5 updates"),
    "another clipping": (edit_wrapper(clip_grad=2.0), '"clip_grad" is 2.0 in'),
    "no loss scaler": (edit_wrapper(loss_scaler=None), '"loss_scaler" is None'),
    "a group more": (
        lambda path: edit(path, lambda base: base["param_groups"].append({"params": []})),
        "parameter group",
    ),
    "another lr": (
        lambda path: edit(path, lambda base: base["param_groups"][1].update(lr=1.0)),
        '"lr" of parameter group 1',
    ),
    "another step": (
        lambda path: edit(path, lambda base: base["state"][0].update(step=torch.tensor(9.0))),
        "updates of tensor 0 is 9.0 in",
    ),
    "too many tensors": (
        edit_lena(lambda lena: lena["pieces"].append([["net.scale", 0, 1, 0]])),
        "is of 4 tensors, and there are 3",
    ),
    "another save's model": (edit_model(lambda model: model.update(ds_lena_save="x")), "are of different saves"),
    "no count": (edit_model(lambda model: model.pop("global_steps")), '"global_steps" is None'),
    "samples a text": (edit_model(lambda model: model.update(global_samples="text")), "\"global_samples\" is 'text'"),
    "no buffer": (edit_model(lambda model: model["module"].update(seen=None)), 'lacks "seen" of this model'),
    "buffer a text": (edit_model(lambda model: model["module"].update(seen="text")), '"seen" is no tensor in'),
    "no group": (
        lambda path: edit(path, lambda base: base.pop("param_groups")),
        "param_groups",
    ),
    "no model": (lambda path: path.with_name("mp_rank_00_model_states.pt").unlink(), "holds no model file"),
    "model cut short": (
        lambda path: path.with_name("mp_rank_00_model_states.pt").write_bytes(b"PK"),
        "mp_rank_00_model_states.pt cannot be read",
    ),
    "latest": (lambda path: (path.parents[1] / "latest").write_text("nowhere"), "Folders in"),
    "latest is empty": (lambda path: (path.parents[1] / "latest").write_text(""), "latest is empty. A run was killed"),
    "latest is no text": (lambda path: (path.parents[1] / "latest").write_bytes(b"\xff\xfe\xff"), "latest cannot be"),
}


def older(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """State version 1 in both files, which has no map, and a change in that of rank 1."""

    def made(path: Path) -> None:
        edit_everywhere(lambda lena: (lena.pop("pieces"), lena.update(version=1)))(path)
        edit(path, change)

    return made


IN_OWN_LAYOUT: dict[str, tuple[Callable[[Path], object], str]] = {
    "older, another update": (older(lambda base: base["lena"].update(update=99)), "are of different saves"),
    "older, NaN": (older(lambda base: first_layer(base["lena"]).update(gain=math.nan)), '"gain" is nan'),
    "older, no state": (older(lambda base: base["state"].clear()), f'{RANK_1} lacks "exp_avg" of'),
    "older, another lr": (older(lambda base: base["param_groups"][0].update(lr=1.0)), '"lr" of parameter group 0'),
    "long": (edit_states(lambda state: state.update(exp_avg=torch.zeros(1000))), 'lacks "exp_avg" of'),
    "no clipping": (edit_wrapper(clip_grad=None), '"clip_grad" is None'),
    "no map at all": (edit_everywhere(lambda lena: lena.pop("pieces")), "the map of pieces is not"),
}
"""Files without a map load in no other layout. There, and at ZeRO 3, other entries are taken."""
LOADS = {"swapped": swap, "no weight": edit_model(lambda model: model["module"].pop("net.left.0.weight"))}
"""Not a fault: the maps say what is where. In its own layout, too, since a swapped map is not the engine's. And the
masters are in the optimizer's files.
"""


def remembered(made: Any) -> dict[str, Any]:
    return checkpoint.to_dict(controller_of(made.basic_optimizer).schedule)


def loaded_one_by_one(folders: dict[str, str], stage: int) -> dict[str, tuple[str, list[str]]]:
    """The error of each folder, and what changed; all in one engine, which loads the good one at the end."""
    model, told = Model(seed=1), {}
    with engine(entries(stage, "fp32", "adamw", {}), model, model_parameters=groups(model)) as made:
        train(made, range(1))
        before, state = whole(made), remembered(made)
        for name, folder in folders.items():
            try:
                made.load_checkpoint(folder)
                told[name] = ("", [])
            except ds_lena.StateError as error:
                changed = differing(before, whole(made))
                changed += ["LENA's state"] if remembered(made) != state or made.global_steps != 1 else []
                told[name] = (str(error), changed)
    return told


def saved(folder: str, stage: int = 2) -> None:
    model = Model()
    with engine(entries(stage, "fp32", "adamw", {}), model, model_parameters=groups(model)) as made:
        train(made, range(2))
        made.save_checkpoint(folder)


@pytest.fixture(scope="module")
def good(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two ranks at ZeRO 2."""
    folder = tmp_path_factory.mktemp("good")
    ranks.run(saved, str(folder))
    return folder


@pytest.mark.parametrize("stage", [2, 3])
def test_one_error_on_every_rank_and_nothing_changes(ranks: Ranks, good: Path, tmp_path: Path, stage: int) -> None:
    """In its own layout, and in another one."""
    expected = FAULTS | (IN_OWN_LAYOUT if stage == 2 else {})
    faults = {name: fault for name, (fault, _) in expected.items()} | LOADS
    folders = {}
    for name, fault in faults.items():
        folder = tmp_path / name
        shutil.copytree(good, folder)
        (file,) = folder.rglob(RANK_1)
        fault(file)
        folders[name] = str(folder)
    first, second = ranks.run(loaded_one_by_one, folders | {"good": str(good)}, stage)
    assert first == second
    wrong = {name: first[name] for name, (_, says) in expected.items() if says not in first[name][0] or first[name][1]}
    assert wrong == {}
    assert first["good"] == ("", [])
    assert all(first[name] == ("", []) for name in LOADS)


def edit_rank_1(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """The model file that rank 1 has at ZeRO 3."""
    return lambda path: rewrite(path.with_name(path.name.replace("optim", "model")), change)


OF_RANK_1 = {
    "another count": (edit_rank_1(lambda model: model.update(global_steps=7)), '"global_steps" of the model file is 7'),
    "no count": (edit_rank_1(lambda model: model.pop("skipped_steps")), '"skipped_steps" is None'),
    "no frozen weight": (edit_rank_1(lambda model: model["frozen_param_fragments"].clear()), "rank_1"),
    "no buffer": (edit_rank_1(lambda model: model["module"].pop("seen")), ""),  # that of rank 0 is taken
}


def test_the_model_files_of_all_ranks_are_checked(ranks: Ranks, tmp_path: Path) -> None:
    good, folders = tmp_path / "good", {}
    ranks.run(saved, str(good), 3)
    for name, (fault, _) in OF_RANK_1.items():
        shutil.copytree(good, tmp_path / name)
        fault(next((tmp_path / name).rglob(RANK_1)))
        folders[name] = str(tmp_path / name)
    first, second = ranks.run(loaded_one_by_one, folders, 3)
    assert first == second
    for name, (_, says) in OF_RANK_1.items():
        text, changed = first[name]
        assert says in text and bool(says) == bool(text) and (changed == [] or not says), (name, first[name])


def loaded_from_own(folders: list[str]) -> str:
    """The error where each rank is given a folder of its own."""
    model = Model(seed=1)
    with engine(entries(2, "fp32", "adamw", {}), model, model_parameters=groups(model)) as made:
        try:
            made.load_checkpoint(folders[dist.get_rank()])
        except ds_lena.StateError as error:
            return str(error)
        return ""


def test_ranks_that_see_different_checkpoints_say_so(ranks: Ranks, good: Path, tmp_path: Path) -> None:
    first, second = ranks.run(loaded_from_own, [str(good), str(tmp_path)])
    assert first.replace(str(good), "") == second.replace(str(good), "")
    assert "the ranks see different checkpoints" in first and '"global_step2", none' in first


# -- at random ---------------------------------------------------------------------------------------------------------


def damaged(data: bytes, where: range, seed: int) -> tuple[bytes, str]:
    """Cut short, or with a flipped bit within `where`."""
    chance = random.Random(seed)
    if chance.random() < 0.3:
        length = chance.randrange(len(data))
        return data[:length], f"cut to {length}"
    place, bit = chance.choice(where), chance.randrange(8)
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :], f"bit {bit} of byte {place}"


def pickle_within(path: Path) -> range:
    """Where in the file the pickle is: all that is not the numbers of a tensor. LENA's part is there."""
    with zipfile.ZipFile(path) as archive:
        (entry,) = (info for info in archive.infolist() if info.filename.endswith("data.pkl"))
        inside = archive.read(entry)
    begin = path.read_bytes().index(inside)
    assert any(argument == "layers" for _, argument, _ in pickletools.genops(inside))
    return range(begin, begin + len(inside))


def loaded_after_damage(folder: str, seeds: range) -> list[str]:
    """Cases that ended neither in an error that names the file, nor in what was saved."""
    model, wrong = Model(seed=1), []
    with engine(entries(2, "fp32", "adamw", {}), model, model_parameters=groups(model)) as made:
        made.load_checkpoint(folder)
        wanted, state = whole(made), remembered(made)
        train(made, range(2, 3))
        (path,) = Path(folder).rglob("*zero_pp_rank_0_*optim_states.pt")
        good, where = path.read_bytes(), pickle_within(path)
        for seed in seeds:
            data, what = damaged(good, where, seed)
            path.write_bytes(data)
            try:
                made.load_checkpoint(folder)
            except ds_lena.StateError as error:
                wrong += [] if path.name in str(error) else [f"{what}: {error}"]
                continue
            is_same = differing(wanted, whole(made)) == [] and remembered(made) == state
            wrong += [] if is_same else [f"{what}: loaded as something else"]
        path.write_bytes(good)
    return wrong


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A single rank."""
    started = Ranks(tmp_path_factory.mktemp("one"), world=1)
    yield started
    started.stop()


@pytest.mark.parametrize("seeds", rest([range(60), range(60, 1000)], [range(60)]))
def test_files_that_are_cut_short_or_have_a_flipped_bit(one: Ranks, tmp_path: Path, seeds: range) -> None:
    one.run(saved, str(tmp_path))
    assert one.run(loaded_after_damage, str(tmp_path), seeds) == [[]]
