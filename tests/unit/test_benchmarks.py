"""The parts of the benchmarks that compute: statistics, order of turns, tables; and that LENA still runs in them."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pytest import approx

from benchmarks import __main__ as suite_module
from benchmarks import memory, tables, tensors, traffic
from benchmarks.collectives import tensors_in
from benchmarks.memory_worker import peaks_by_phase
from benchmarks.models import Chain, chain_width
from benchmarks.ready_made import PLAIN, contestant, with_steps
from benchmarks.roster import LENA, REFERENCE, NotAvailable, available, make
from benchmarks.timing import Stopwatch, against, compare, fit_line, measure, quartiles, warm_up
from tests.unit.support import vector

CPU = torch.device("cpu")


def test_ratios_are_taken_within_rounds():
    found = against([2.0, 6.0, 3.0], [1.0, 2.0, 3.0])
    assert found["rounds"] == 3
    assert found["paired_ratio"]["median"] == 2  # of 2, 3, 1
    assert found["ratio_of_medians"] == 3 / 2
    assert found["ratio_of_minima"] == 2
    assert found["added"] == {"q1": 0.5, "median": 1.0, "q3": 2.5}


def test_the_reference_is_once_itself():
    samples = {"a": {"step": [1.0, 2.0]}, "b": {"step": [3.0, 4.0], "more": [1.0, 1.0]}}
    compared = compare(samples, "a")
    assert list(compared) == ["step"], "phases that the reference does not have cannot be compared"
    assert compared["step"]["a"]["ratio_of_medians"] == 1
    assert compared["step"]["b"]["ratio_of_medians"] == approx(3.5 / 1.5)


def test_quartiles():
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == {"q1": 2, "median": 3, "q3": 4}


def test_a_line():
    assert fit_line([1, 2, 4], [5, 7, 11]) == approx({"slope": 2, "intercept": 3})


def test_contestants_take_turns_forwards_and_backwards():
    turns = []

    def contestant_named(name):
        def update(lap):
            turns.append(name)
            lap("step")

        return update

    contestants = {name: contestant_named(name) for name in "ABC"}
    samples = measure(contestants, 0.0, Stopwatch("wall", lambda: None), runs_ahead=False)
    assert "".join(turns) == "ABCCBAABC"
    assert {len(phases["step"]) for phases in samples.values()} == {3}
    assert samples["A"]["update"] == samples["A"]["step"]


def test_a_device_that_runs_ahead_has_rounds_for_wholes_and_for_phases():
    def update(lap):
        lap("step")

    samples = measure({"A": update}, 0.0, Stopwatch("wall", lambda: None), runs_ahead=True)
    assert len(samples["A"]["update"]) == len(samples["A"]["step"]) == 3


def test_a_table_leaves_the_reference_to_the_column_beside():
    samples = {"a": {"step": [0.001, 0.001]}, "b": {"step": [0.002, 0.002]}}
    row = ["7", "b", "2", "1.0", "2.0", "**2.000**", "2.000", "2.000 [2.000, 2.000]", "+1.0 [+1.0, +1.0]"]
    rows = tables.versus(["7"], compare(samples, "a")["step"], "a")
    assert rows == [row]
    assert len(["case", *tables.versus_head("a")]) == len(row)
    assert tables.table(["x"], [["1"]]) == "| x |\n| ---: |\n| 1 |"


def test_the_largest_chain_of_layers_that_fits():
    for count, elements in ((100, 30_000_000), (10_000, 30_000_000), (2, 6)):
        width = chain_width(count, elements)
        assert count // 2 * width * (width + 1) <= elements < count // 2 * (width + 1) * (width + 2)


def test_a_long_chain_stays_finite():
    chain = Chain(1000, 100_000)
    chain(torch.randn(4, chain.width)).square().mean().backward()
    assert len(list(chain.parameters())) == 1000
    assert all(torch.isfinite(parameter.grad).all() for parameter in chain.parameters())


def test_peaks_belong_to_the_phase_in_which_they_are_reached():
    events = [("", 10), ("", -4), ("backward", 0), ("", 3), ("", -9), ("step", 0)]
    assert peaks_by_phase(events) == {"backward": 10, "step": 9}


def test_extra_bytes_per_parameter():
    def case(*live):
        return {"runs": [{"parameters": 10, "live": each} for each in live]}

    assert memory.extra(case(140, 100, 120), case(100, 100, 100), "live") == 2


def test_traffic_is_that_of_the_busiest_rank():
    by_rank = [
        {"reduce": {"calls": 1.0, "bytes": 8.0}},
        {"reduce": {"calls": 2.0, "bytes": 4.0}, "send": {"calls": 1.0, "bytes": 1.0}},
    ]
    assert traffic.busiest(by_rank) == {"reduce": {"calls": 2, "bytes": 8}, "send": {"calls": 1, "bytes": 1}}


def test_tensors_in_lists_of_lists():
    a, b = torch.ones(1), torch.zeros(2)
    assert [id(one) for one in tensors_in([[a], [[b]], None, 3])] == [id(a), id(b)]


def test_what_lena_adds_is_a_line_over_the_tensors():
    def case(count, ours):
        return {"tensors": count, "seconds": {REFERENCE: {"step": [1.0] * 3}, tensors.OURS: {"step": [ours] * 3}}}

    assert tensors.added_line([case(10, 1.3), case(20, 1.5)], "tensors", "step") == approx(
        {"slope": 0.02, "intercept": 0.1}
    )


# -- optimizers --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_had_is_named():
    found, left_out = available([REFERENCE, "DeepSpeed FusedAdam"], CPU)
    assert found == [REFERENCE]
    assert left_out == {"DeepSpeed FusedAdam": "for parameters on a GPU only"}


@pytest.mark.parametrize("name", ["timm Lamb", "timm Lars", *LENA.values()])
def test_an_optimizer_moves_its_parameters_or_says_why_not(name):
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))  # a warm-up begins with tiny steps
    try:
        optimizer = make(name, [parameter])
    except NotAvailable as reason:
        pytest.skip(str(reason))
    parameter.sum().backward()
    optimizer.step()
    assert (parameter < 1).all()


def train_on_ready_made_gradients(name, updates):
    gradients = [vector(1, -2, 0.5), vector(0.1, 0.2)]
    weights = [torch.ones_like(gradient) for gradient in gradients]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    update = contestant(name, weights, gradients, passes=2)
    warm_up({name: update}, updates)
    return torch.cat(weights)


def test_lena_moves_alike_in_plain_pytorch_and_as_under_an_engine():
    name = LENA["adamw"]
    moved = train_on_ready_made_gradients(name, updates=3)
    assert not torch.equal(moved, torch.ones_like(moved))
    assert torch.equal(moved, train_on_ready_made_gradients(name + PLAIN, updates=3))


def test_the_two_parts_of_a_step_are_added_up():
    samples = {"lena": {"measure": [1.0, 2.0], "move": [3.0, 5.0]}, "other": {"step": [1.0, 1.0]}}
    assert with_steps(samples)["lena"]["step"] == [4, 7]
    assert with_steps(samples)["other"] == {"step": [1, 1]}


# -- the suite ---------------------------------------------------------------------------------------------------------


def suite(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words])
    return suite_module.main()


@pytest.fixture
def started(monkeypatch):
    """The command lines that the suite runs; each writes a file, but for "memory", which fails."""
    commands = []

    def run(command, **_):
        commands.append(command[1:])
        failed = "benchmarks.memory" in command
        if not failed:
            Path(command[command.index("--out") + 1]).write_text("{}")
        return subprocess.CompletedProcess(command, returncode=int(failed))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(suite_module, "markdown", lambda results, as_tables: as_tables.__module__)
    return commands


def test_the_suite_runs_what_is_named(monkeypatch, started, tmp_path):
    assert suite(monkeypatch, "hooks", "--only", "traffic", "--quick", "--out", str(tmp_path)) == 0
    assert [command[1:3] for command in started] == [["benchmarks.hooks", "--quick"], ["benchmarks.traffic", "--quick"]]


def test_the_tables_hold_earlier_results_too_and_name_what_failed(monkeypatch, started, tmp_path):
    suite(monkeypatch, "hooks", "--out", str(tmp_path))
    (tmp_path / "memory.json").write_text("{}")
    assert suite(monkeypatch, "engines", "memory", "--out", str(tmp_path)) == 1
    written = (tmp_path / "tables.md").read_text().split()
    assert written[:7] == ["#", "Benchmarks", "##", "engines", "benchmarks.step_time", "##", "hooks"]
    assert "Failed;" in written
    assert not (tmp_path / "memory.json").exists(), "no numbers of an earlier run in place of those that failed"


def test_every_benchmark_of_the_suite_has_tables():
    assert all(callable(importlib.import_module(module).as_tables) for module in suite_module.MODULES.values())


def test_an_unknown_benchmark_is_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        suite(monkeypatch, "speed")
    assert "speed: not one of optimizers, engines" in capsys.readouterr().err
