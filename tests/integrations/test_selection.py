"""How LENA is chosen: by name in the JSON, by object, by a script that does not know it, or without DeepSpeed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ds_lena
from tests.helpers.marks import rest
from tests.integrations._engines import LENA, Net, config, engine, train, without_optimizer
from tests.integrations._programs import SCRIPTS, launch, python
from tests.integrations._ranks import Ranks

HfRun = Callable[[str], list[dict[str, Any]]]

NAMED = (
    'deepspeed.initialize(model=model, config={**config, "optimizer": {"type": "LENA", "params": {"warmup": "none"}}})'
)
GIVEN = "deepspeed.initialize(model=model, config=config, optimizer=optimizer)"
STARTS = {
    "named, ds_lena first": f"""
import ds_lena
import deepspeed
engine = {NAMED}[0]""",
    "named, deepspeed first": f"""
import deepspeed
import ds_lena
engine = {NAMED}[0]""",
    "constructed before deepspeed is imported": f"""
import ds_lena
optimizer = ds_lena.LENA(model.parameters(), warmup="none")
assert "deepspeed" not in sys.modules
import deepspeed
engine = {GIVEN}[0]""",
}
SCRIPT = """
import sys
import torch
from benchmarks.command import leave
model = torch.nn.Linear(2, 1)
config = {{"train_micro_batch_size_per_gpu": 1, "zero_optimization": {{"stage": 2}}}}
{start}
engine.backward(engine(torch.ones(1, 2)).sum())
engine.step()
print("updates:", ds_lena.report(engine)["update"], *ds_lena.report(engine)["layers"])
leave()
"""


# The first two are how the ranks of these tests, and `ds_lena.run` below, come to both.
@pytest.mark.parametrize("start", rest(STARTS, ["constructed before deepspeed is imported"]))
def test_the_order_of_imports_does_not_matter(start: str) -> None:
    assert "updates: 1 weight bias" in python("-c", SCRIPT.format(start=STARTS[start]))


# -- in one process, by name and by object -----------------------------------------------------------------------------


def train_with(how: str, stage: int, precision: str = "fp32") -> tuple[str, dict[str, Any]]:
    """The class of the inner optimizer and the report after three updates."""
    model = Net()
    entries = config(stage, precision)
    how_to_give = {
        "json": lambda: {},
        "parameters": lambda: {"optimizer": ds_lena.LENA(model.parameters(), **LENA)},
        "named parameters": lambda: {"optimizer": ds_lena.LENA(model.named_parameters(), **LENA)},
        "callable": lambda: {"optimizer": lambda parameters: ds_lena.LENA(parameters, **LENA)},
    }
    given = how_to_give[how]()
    if given:
        entries = without_optimizer(entries)
    with engine(entries, model, **given) as made:
        train(made, range(3))
        return type(made.basic_optimizer).__name__, ds_lena.report(made)


@pytest.mark.parametrize("stage", range(4))
def test_every_way_of_giving_it_trains_the_same(ranks: Ranks, stage: int) -> None:
    """At ZeRO 1-3 without "zero_allow_untested_optimizer"; names come from the engine."""
    name, report = ranks.run(train_with, "json", stage)[0]
    assert name == "LENA"
    assert report["update"] == 3
    assert list(report["layers"]) == [parameter for parameter, _ in Net().named_parameters()]
    for how in ("parameters", "named parameters", "callable"):
        for rank in ranks.run(train_with, how, stage):
            assert rank == ("LENA", report)


def layers_of_reversed_groups() -> list[str]:
    model = Net()
    groups = [{"params": list(tower.parameters())} for tower in (model.right, model.left)]
    groups.append({"params": [torch.nn.Parameter(torch.ones(3))]})  # of no module, which ZeRO 1-3 do not take
    with engine(config(0), model, model_parameters=groups) as made:
        return list(ds_lena.report(made)["layers"])


def test_layers_are_in_the_order_of_the_model_whatever_that_of_the_groups(ranks: Ranks) -> None:
    names = [name for name, _ in Net().named_parameters()]
    assert ranks.run(layers_of_reversed_groups) == [[*names, f"param_{len(names)}"]] * 2


def name_in_lower_case() -> str:
    entries = config(1)
    entries["optimizer"]["type"] = "lena"
    try:
        with engine(entries):
            return "made"
    except AssertionError as error:
        return str(error)


def test_the_name_is_case_sensitive_as_deepspeed_says(ranks: Ranks) -> None:
    assert ranks.run(name_in_lower_case) == ["lena is not a supported DeepSpeed Optimizer"] * 2


# -- a script that does not know ds_lena -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unaware(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the ranks of scripts/unaware.py saw."""
    folder = tmp_path_factory.mktemp("unaware")
    entries = folder / "ds.json"
    entries.write_text(json.dumps(config(2, lena={"warmup": "none"}, train_micro_batch_size_per_gpu=2)))
    script = str(SCRIPTS / "unaware.py")
    launch("--module", "ds_lena.run", script, "--my-arg", "x", str(folder), str(entries))
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_an_unmodified_script_trains_with_lena(unaware: list[dict[str, Any]]) -> None:
    assert [(saw["optimizer"], saw["moved"]) for saw in unaware] == [("LENA", True)] * 2


def test_an_unmodified_script_runs_as_if_it_were_launched_itself(unaware: list[dict[str, Any]]) -> None:
    for rank, saw in enumerate(unaware):
        script, *arguments = saw["argv"]
        assert script == saw["file"] == str(SCRIPTS / "unaware.py")
        assert arguments[:3] == [f"--local_rank={rank}", "--my-arg", "x"]
        assert (saw["name"], saw["my_arg"], saw["local_rank"]) == ("__main__", "x", rank)


# -- HF Trainer and accelerate -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["no scheduler", "scheduler"])
def test_the_length_of_a_run_is_the_trainers(hf_run: HfRun, name: str) -> None:
    """With a scheduler whose total_num_steps is "auto", and with none in the JSON."""
    for run in hf_run(name):
        assert run["total_steps"] == run["updates"] == 8
        assert run["report"]["update"] == 8


def test_the_trainers_auto_values_reach_lena(hf_run: HfRun) -> None:
    for run in hf_run("no scheduler"):
        assert run["lr"][0] == 3e-3
        assert run["weight_decay"] == 0.02


def test_the_trainers_scheduler_moves_the_learning_rate(hf_run: HfRun) -> None:
    assert [run["lr"][1] for run in hf_run("no scheduler")] == [0.0, 0.0], "linear decay has ended"


def test_the_trainers_short_last_window_is_counted(hf_run: HfRun) -> None:
    for run in hf_run("no scheduler"):
        assert run["n"] == [4, 4, 4, 2] * 2


def test_accelerate_alone_trains_with_its_placeholders(hf_run: HfRun) -> None:
    for run in hf_run("accelerate"):
        assert run["report"]["update"] == 3
        assert run["total_steps"] == 6


# -- without DeepSpeed -------------------------------------------------------------------------------------------------


def test_plain_pytorch_needs_neither_deepspeed_nor_transformers() -> None:
    run = json.loads(python(str(SCRIPTS / "plain_pytorch.py")).splitlines()[-1])
    assert run["imported"] == []
    assert list(run["report"]["layers"]) == ["weight", "bias"]
    assert run["report"]["update"] == 20
    assert run["losses"][-1] < run["losses"][0] / 2


def test_it_is_a_torch_optimizer_under_its_own_name() -> None:
    assert torch.optim.LENA is ds_lena.LENA
    assert issubclass(ds_lena.LENA, torch.optim.Optimizer)
