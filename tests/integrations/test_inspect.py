"""Reading a checkpoint without DeepSpeed, and the way back to a stock optimizer."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn

import ds_lena
from ds_lena.inspect import as_text, inspect, main
from tests.helpers.marks import rest
from tests.integrations._engines import Net, config, engine, moved, stock_engine, train
from tests.integrations._ranks import Ranks

BLOCKED = "import sys, runpy; sys.modules['deepspeed'] = None; runpy.run_module('ds_lena.inspect', run_name='__main__')"
LAYOUTS = [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")] + [(1, "bf16-fp32")]
SHOWN = ("gain", "warmup", "noise", "signal")


def save(folder: str, stage: int, precision: str = "fp32", lena: dict[str, Any] | None = None) -> dict[str, Any]:
    with engine(config(stage, precision, lena or {})) as made:
        train(made, range(3))
        made.save_checkpoint(folder)
        return ds_lena.report(made)


@pytest.mark.parametrize(("stage", "precision"), rest(LAYOUTS, [(0, "fp32"), (1, "bf16-fp32"), (3, "bf16")]))
def test_it_shows_what_a_report_shows(ranks: Ranks, tmp_path: Path, stage: int, precision: str) -> None:
    told = ranks.run(save, str(tmp_path), stage, precision)[0]
    found = inspect(tmp_path)
    assert {key: found["lena"][key] for key in ("update", "n")} == {"update": told["update"], "n": told["n"]}
    assert list(found["layers"]) == list(told["layers"])
    for name, layer in told["layers"].items():
        assert [found["layers"][name][key] for key in SHOWN] == pytest.approx([layer[key] for key in SHOWN])
        assert found["layers"][name]["progress"] == layer["state"]
    elements = sum(parameter.numel() for parameter in Net().parameters())
    assert sum(file["elements"] for file in found["files"].values()) == elements
    assert len(found["files"]) == (1 if stage == 0 else 2) and found["saved_by"]["ranks"] == 2
    assert inspect(tmp_path / "global_step3") == found
    assert json.loads(json.dumps(found)) == found


def plain(path: Path, **keys: Any) -> ds_lena.LENA:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = ds_lena.LENA(model.named_parameters(), lr=0.1, warmup="none", **keys)
    for _ in range(2):
        for _ in range(2):
            model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    return optimizer


def test_the_command_needs_no_deepspeed(tmp_path: Path) -> None:
    plain(tmp_path / "mine.pt")
    command = [sys.executable, "-c", BLOCKED, str(tmp_path / "mine.pt")]
    folder = str(Path(ds_lena.__file__).parents[1])
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": folder}
    )
    assert "update 2" in done.stdout and done.stdout.splitlines()[-1].startswith("bias")


def test_the_authors_variant_has_no_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain(tmp_path / "mine.pt", variant="authors-code")
    found = inspect(tmp_path / "mine.pt")
    assert all(layer["noise"] is None and layer["gain"] > 0 for layer in found["layers"].values())
    assert main([str(tmp_path / "mine.pt")]) == 0
    assert capsys.readouterr().out == as_text(found) + "\n" and "–" in as_text(found)
    assert main([str(tmp_path / "mine.pt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found


class Other:
    """An object that a script keeps beside the optimizer. `call`: what would make it again."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call or super().__reduce__()


def test_nothing_in_a_file_is_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    optimizer = plain(tmp_path / "mine.pt")
    torch.save({"optimizer": optimizer.state_dict(), "other": Other(print, ("hello",))}, tmp_path / "other.pt")
    assert inspect(tmp_path / "other.pt")["layers"] == inspect(tmp_path / "mine.pt")["layers"]
    torch.save({"other": Other(os.mkdir, (str(tmp_path / "made"),))}, tmp_path / "hostile.pt")
    with pytest.raises(ds_lena.StateError, match="cannot be read"):
        inspect(tmp_path / "hostile.pt")
    assert capsys.readouterr().out == "" and not (tmp_path / "made").exists()


def test_what_cannot_be_read_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    optimizer = plain(tmp_path / "mine.pt")
    content = (tmp_path / "mine.pt").read_bytes()
    (tmp_path / "short.pt").write_bytes(content[: len(content) // 3])
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"state": {}, "param_groups": []}, tmp_path / "stock.pt")
    torch.save([{"lena": optimizer.state_dict()["lena"]}], tmp_path / "list.pt")
    torch.save({"a": optimizer.state_dict(), "b": optimizer.state_dict()}, tmp_path / "two.pt")
    torch.save({"lena": {"version": 2}}, tmp_path / "damaged.pt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "latest").write_text("global_step9")
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "latest").write_bytes(b"\xff\xfe")
    for name, told in {
        "nowhere": "there is no ",
        "short.pt": "cannot be read",
        "text.pt": "cannot be read",
        "stock.pt": "holds no state of LENA",
        "list.pt": "holds no state of LENA",
        "two.pt": "2 states of LENA",
        "damaged.pt": 'damaged: "variant" is nothing',
        "empty": "holds no checkpoint of DeepSpeed",
        "gone": 'names "global_step9", which is not there',
        "binary": "latest cannot be read",
    }.items():
        assert main([str(tmp_path / name)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("LENA: ") and told in said and name in said and "Traceback" not in said


def test_files_of_two_saves_are_told(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(save, str(tmp_path / "a"), 2)
    ranks.run(save, str(tmp_path / "b"), 2, "fp32", {"gain_power": 0.2})
    first, third = (f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (1, 2))
    before = inspect(tmp_path / "a")
    shutil.copy(tmp_path / "b" / "global_step3" / first, tmp_path / "a" / "global_step3" / third)
    assert inspect(tmp_path / "a") == before, "an older save by more ranks"
    shutil.copy(tmp_path / "b" / "global_step3" / first, tmp_path / "a" / "global_step3" / first)
    with pytest.raises(ds_lena.StateError, match="hold other states of LENA"):
        inspect(tmp_path / "a")


# -- files that are missing, of an older save, or damaged --------------------------------------------------------------

MODEL, CUT = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"
EXPERTS = [f"expp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)]
RANK_0, RANK_1 = (f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2))


def state_of(updates: int = 2) -> dict[str, Any]:
    """An optimizer's state as a file of DeepSpeed holds it."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = ds_lena.LENA(model.named_parameters(), lr=0.1, warmup="none")
    for _ in range(updates):
        for _ in range(2):
            model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    state = optimizer.state_dict()
    state["lena"]["pieces"] = [[["weight", 0, 6, 0]], [["bias", 0, 2, 0]]]
    return state


def lay(
    folder: Path, updates: int = 2, stage: int = 2, ranks: int = 2, parts: int = 1, is_bf16: bool = False, **more: Any
) -> Path:
    """The files of a save, in the form of DeepSpeed. `more`: entries of the model files."""
    folder.mkdir(exist_ok=True)
    state = state_of(updates)
    model = {
        "dp_world_size": ranks,
        "mp_world_size": parts,
        "ds_version": "0",
        "ds_config": {"bf16": {"enabled": is_bf16}},
    }
    model |= {"optimizer": None if stage else state, "param_shapes": [{}] if stage else None, **more}
    for part in range(parts):
        end = f"mp_rank_{part:02d}"
        if stage < 3:
            torch.save(model, folder / f"{end}_model_states.pt")
        for rank in range(ranks):
            begin = f"zero_pp_rank_{rank}_{end}"
            if stage == 3:
                torch.save(model, folder / f"{begin}_model_states.pt")
            if stage or more.get("num_experts"):
                optimizer = {
                    "optimizer_state_dict": {"zero_stage": stage, "base_optimizer_state": state},
                    "ds_version": "0",
                }
                name = f"{'bf16_' if is_bf16 else ''}{begin}" if stage else f"expp_rank_{rank}_{end}"
                torch.save(optimizer, folder / f"{name}_optim_states.pt")
    return folder


@pytest.mark.parametrize(
    ("older", "newer", "read"),
    [
        ({"ranks": 3}, {"ranks": 2}, [RANK_0, RANK_1]),
        ({"ranks": 3, "stage": 3}, {"ranks": 1, "stage": 3}, [RANK_0]),
        ({"ranks": 1, "parts": 2}, {"ranks": 2}, [RANK_0, RANK_1]),
        ({"ranks": 3}, {"ranks": 2, "is_bf16": True}, [f"bf16_{RANK_0}", f"bf16_{RANK_1}"]),
        ({"ranks": 3, "is_bf16": True}, {"ranks": 1}, [RANK_0]),
        ({"ranks": 3}, {"ranks": 2, "stage": 3}, [RANK_0, RANK_1]),
        ({"ranks": 3, "stage": 3}, {"ranks": 1}, [RANK_0]),
        ({"stage": 0, "num_experts": [4]}, {"stage": 0}, [MODEL]),
        ({"stage": 0, "num_experts": [4]}, {"ranks": 1, "num_experts": [4]}, [RANK_0]),
        ({"stage": 0}, {"stage": 0, "num_experts": [4]}, EXPERTS),
        ({"stage": 0}, {"stage": 0, "parts": 2}, [MODEL, MODEL.replace("00", "01")]),
    ],
)  # fmt: skip
def test_a_save_over_an_older_one_is_read(tmp_path: Path, older: Any, newer: Any, read: list[str]) -> None:
    lay(tmp_path, updates=1, **older)
    for path in tmp_path.iterdir():
        os.utime(path, (1e9, 1e9))
    torch.save({"weight": torch.zeros(3)}, tmp_path / "layer_00-model_states.pt")  # as pipelines have
    found = inspect(lay(tmp_path, **newer))
    assert list(found["files"]) == read and found["lena"]["update"] == 2
    assert all(file == {"tensors": 2, "elements": 8, "parameters": 2} for file in found["files"].values())
    assert found["saved_by"]["ranks"] == newer.get("ranks", 2)
    assert "tally" in found["lena"] and "tally" not in as_text(found)


def remove(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def add(**keys: Any) -> Any:
    return lambda folder: lay(folder, **keys)


@pytest.mark.parametrize(
    ("save", "change", "told"),
    [
        ({}, remove(RANK_1), "was saved by 2 ranks, and the optimizer file of rank 1 is not there"),
        ({"ranks": 3}, remove(RANK_1), "was saved by 3 ranks, and the optimizer file of rank 1 is not there"),
        (
            {"ranks": 1},
            remove(RANK_0),
            "the optimizer file of rank 0 is not there (*rank_0_mp_rank_00_optim_states.pt)",
        ),
        ({"ranks": 1, "is_bf16": True}, remove(f"bf16_{RANK_0}"), "the optimizer file of rank 0 is not there"),
        ({"stage": 3}, remove(RANK_0), "the optimizer file of rank 0 is not there"),
        ({"stage": 3}, remove(CUT.replace("rank_0_", "rank_1_")), "zero_pp_rank_1_mp_rank_00_model_states.pt is not"),
        ({"parts": 2}, remove(RANK_1.replace("00", "01")), "is not there (*rank_1_mp_rank_01_optim_states.pt)"),
        ({"parts": 2}, remove(MODEL.replace("00", "01")), "no model file of part 1 of the model (*mp_rank_01_model"),
        ({"stage": 0, "num_experts": [4]}, remove(EXPERTS[0]), "is not there (*rank_0_mp_rank_00_optim_states.pt)"),
        ({}, remove(MODEL), f"no model file of part 0 of the model (*{MODEL})"),
        ({"stage": 3}, remove(CUT), f"no model file of part 0 of the model (*{MODEL})"),
        ({"dp_world_size": None}, lambda _: None, f'"dp_world_size" in {{folder}}/{MODEL} is None'),
        ({}, lambda folder: torch.save([1], folder / MODEL), "it holds no dictionary"),
        ({"is_bf16": True}, add(ds_config="there.json"), "the files of two saves: bf16_zero_* are of one in bf16"),
    ],
)
def test_a_missing_file_is_told(tmp_path: Path, save: Any, change: Any, told: str) -> None:
    change(lay(tmp_path, **save))
    with pytest.raises(ds_lena.StateError) as raised:
        inspect(tmp_path)
    assert told.format(folder=tmp_path) in str(raised.value)


def first_layer(lena: dict[str, Any]) -> Any:
    return next(iter(lena["layers"].values()))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda state: state["lena"].update(update=True), '"update" is True, and should be a whole number >= 0.'),
        (lambda state: state["lena"].update(n=torch.tensor(2.0)), '"n" is tensor(2.)'),
        (lambda state: first_layer(state["lena"]).update(averages=[math.nan, 1.0]), '"averages" is [nan, 1.0]'),
        (lambda state: state["lena"].update(version=3), "has version 3"),
        (lambda state: state["lena"].pop("pieces"), '"pieces" is nothing, and an engine writes it'),
        (lambda state: state["lena"].update(pieces=None), 'in "pieces" the map of pieces is not a list of lists'),
        (lambda state: state["lena"]["pieces"].append([["x", 0, 1, 0]]), "is of 3 tensors, and there are 2"),
        (lambda state: state["lena"]["pieces"].pop(), "is of 1 tensors, and there are 2"),
        (lambda state: state["lena"]["pieces"][0].append(["x", 0, 1]), "['x', 0, 1] is not a piece"),
        (lambda state: state["lena"]["pieces"][1][0].__setitem__(1, 1), '"bias" is at elements 1 to 3 of tensor 1'),
        (lambda state: state["lena"]["pieces"][0].append(["x", 5, 1, 0]), '5 to 6 of tensor 0, where "weight"'),
        (lambda state: state.pop("param_groups"), '"param_groups" of the checkpoint is None'),
        (lambda state: state["param_groups"][0].pop("params"), "is damaged (KeyError('params'))"),
        (lambda state: state["param_groups"][0].update(lr=math.nan), 'group 0 of the checkpoint has "lr": nan'),
        (lambda state: state["param_groups"][0].pop("betas"), 'group 0 of the checkpoint has no "betas"'),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stage", [0, 2])
def test_a_damaged_state_is_told_with_its_file(tmp_path: Path, change: Any, told: str, stage: int) -> None:
    """The same in all files, so that they agree. In the folder, and in a file of it."""
    files = []
    for path in lay(tmp_path, stage=stage, ranks=2).iterdir():
        content = torch.load(path)
        state = (
            content["optimizer_state_dict"]["base_optimizer_state"]
            if "optimizer_state_dict" in content
            else content["optimizer"]
        )
        if state is not None:
            change(state)
            torch.save(content, path)
            files.append(path)
    for path in (tmp_path, *files):
        with pytest.raises(ds_lena.StateError) as raised:
            inspect(path)
        assert told in str(raised.value) and str(min(files) if path == tmp_path else path) in str(raised.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda state: state["param_groups"][0].update(lr=0.2), '"lr" of parameter group 0 is 0.2 in {one} and 0.1 in'),
        (lambda state: state["state"][1].update(step=3.0), "updates of tensor 1 is 3.0 in {one} and 2.0 in"),
        (lambda state: state["state"][1].update(step=1.5), "{one} is damaged: ValueError('tensor 1 has had 1.5"),
        (lambda state: state["state"].update({1: "text"}), "{one} is damaged: "),
    ],
)
@pytest.mark.parametrize("stage", [2, 3])
def test_a_rank_that_would_go_on_otherwise_is_told(tmp_path: Path, change: Any, told: str, stage: int) -> None:
    path = lay(tmp_path, stage=stage, parts=2) / RANK_1.replace("mp_rank_00", "mp_rank_01")
    content = torch.load(path)
    change(content["optimizer_state_dict"]["base_optimizer_state"])
    torch.save(content, path)
    with pytest.raises(ds_lena.StateError) as raised:
        inspect(tmp_path)
    assert told.format(one=path) in str(raised.value)


def test_a_file_without_a_state_of_lena_is_told(tmp_path: Path) -> None:
    path = lay(tmp_path) / RANK_1
    content = torch.load(path)
    content["optimizer_state_dict"]["base_optimizer_state"]["lena"] = "text"
    torch.save(content, path)
    with pytest.raises(ds_lena.StateError, match=f"{RANK_1} holds no state of LENA, and {RANK_0} does"):
        inspect(tmp_path)


def test_files_of_version_1_have_no_pieces(tmp_path: Path) -> None:
    for path in lay(tmp_path).glob("*optim_states.pt"):
        content = torch.load(path)
        lena = content["optimizer_state_dict"]["base_optimizer_state"]["lena"]
        lena["version"] = 1
        del lena["pieces"], lena["tally"]
        torch.save(content, path)
    nothing = {"tensors": 0, "elements": 0, "parameters": 0}
    assert inspect(tmp_path)["files"] == {RANK_0: nothing, RANK_1: nothing}


def test_a_flipped_bit_in_a_number_is_told(tmp_path: Path) -> None:
    path = lay(tmp_path) / RANK_1
    data = path.read_bytes()
    place = data.index(b"planned_for") + 20
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    with pytest.raises(ds_lena.StateError, match=f"{RANK_1} cannot be read"):
        inspect(tmp_path)


# -- the way back -----------------------------------------------------------------------------------------------------


def back_to_stock(folder: str, stage: int) -> bool:
    """Whether AdamW goes on from a checkpoint of LENA with its weights and moments, and can be trained on."""
    with engine(config(stage)) as made:
        train(made, range(3))
        made.save_checkpoint(folder)
        weights, moments = moved(made), list(made.basic_optimizer.state.values())
    with stock_engine(config(stage), Net(seed=1)) as stock:
        stock.load_checkpoint(folder)
        loaded = list(stock.basic_optimizer.state.values())
        same = [torch.equal(a, b) for a, b in zip(weights, moved(stock), strict=True)]
        same += [float(a["step"]) == float(b["step"]) == 3 for a, b in zip(moments, loaded, strict=True)]
        same += [
            torch.equal(a[key], b[key])
            for a, b in zip(moments, loaded, strict=True)
            for key in ("exp_avg", "exp_avg_sq")
        ]
        train(stock, range(3, 4))
        return all(same) and not torch.equal(weights[0], moved(stock)[0])


@pytest.mark.parametrize("stage", rest(range(4), [0, 2]))
def test_a_stock_adamw_loads_lenas_checkpoint(ranks: Ranks, tmp_path: Path, stage: int) -> None:
    assert ranks.run(back_to_stock, str(tmp_path), stage) == [True, True]


def weights_by_zero_to_fp32(folder: str, stage: int, precision: str) -> bool:
    """Whether DeepSpeed's script finds the master weights in the files."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with engine(config(stage, precision)) as made:
        train(made, range(2))
        made.save_checkpoint(folder)
        masters = {name: safe_get_full_fp32_param(p) for name, p in made.module.named_parameters()}
    found = get_fp32_state_dict_from_zero_checkpoint(folder)
    return found.keys() == masters.keys() and all(torch.equal(found[name], masters[name]) for name in masters)


@pytest.mark.parametrize(("stage", "precision"), rest([(1, "fp32"), (2, "bf16"), (3, "bf16")], [(3, "bf16")]))
def test_zero_to_fp32_works(ranks: Ranks, tmp_path: Path, stage: int, precision: str) -> None:
    assert ranks.run(weights_by_zero_to_fp32, str(tmp_path), stage, precision) == [True, True]
