"""Reading a checkpoint without DeepSpeed, and the way back to a stock optimizer."""

from __future__ import annotations

import json
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
    for name, told in {
        "nowhere": "there is no ",
        "short.pt": "cannot be read",
        "text.pt": "cannot be read",
        "stock.pt": "holds no state of LENA",
        "list.pt": "holds no state of LENA",
        "two.pt": "2 states of LENA",
        "damaged.pt": "damaged: base, layers, n, update, variant missing",
        "empty": "holds no checkpoint of DeepSpeed",
        "gone": 'names "global_step9", which is not there',
    }.items():
        assert main([str(tmp_path / name)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("LENA: ") and told in said and name in said and "Traceback" not in said


def test_files_of_two_saves_are_told(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(save, str(tmp_path / "a"), 2)
    ranks.run(save, str(tmp_path / "b"), 2, "fp32", {"gain_power": 0.2})
    first = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shutil.copy(tmp_path / "b" / "global_step3" / first, tmp_path / "a" / "global_step3" / first)
    with pytest.raises(ds_lena.StateError, match="hold other states of LENA"):
        inspect(tmp_path / "a")


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
