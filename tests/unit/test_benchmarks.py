"""The parts of the benchmarks that compute: statistics, order of turns, tables; and that LENA still runs in them."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pytest import approx
from torch.autograd import DeviceType

from benchmarks import __main__ as suite_module
from benchmarks.contestants import ADAMW, FUSED_ADAM, LENA, Chain, NotAvailable, available, make, rivals
from benchmarks.footprint import added_traffic, tracked_peaks
from benchmarks.optimizers import added_line, ready_made
from benchmarks.profiling import MARK, _mean
from benchmarks.scaling import LAYERS, fitted
from benchmarks.timing import HEAD, against, measure, table, versus, warm_up
from ds_lena.cost import MACHINES, all_reduce_seconds
from tests.unit.support import vector

CPU = torch.device("cpu")


def test_ratios_are_taken_within_rounds():
    found = against([2.0, 6.0, 3.0], [1.0, 2.0, 3.0])
    assert (found["rounds"], found["median"], found["reference"]) == (3, 3, 2)
    assert found["paired"] == 2  # of 2, 3, 1
    assert found["ratio_of_medians"] == 3 / 2
    assert found["ratio_of_minima"] == 2
    assert [found[name] for name in ("added_q1", "added", "added_q3")] == [0.5, 1.0, 2.5]


def test_contestants_take_turns_forwards_and_backwards():
    turns = []

    def contestant_named(name):
        def update(lap):
            turns.append(name)
            lap("forward")
            lap("step")

        return update

    samples = measure({name: contestant_named(name) for name in "ABC"}, 0.0, CPU)
    assert "".join(turns) == "ABCCBAABC"
    assert {len(phases["step"]) for phases in samples.values()} == {3}
    assert samples["A"]["update"] == [a + b for a, b in zip(samples["A"]["forward"], samples["A"]["step"], strict=True)]


def test_a_device_that_runs_ahead_has_rounds_for_wholes_and_for_phases(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: waits.append(1))
    samples = measure({"A": lambda lap: lap("step")}, 0.0, torch.device("meta"))
    assert len(samples["A"]["update"]) == len(samples["A"]["step"]) == 3
    assert len(waits) == 12, "before and after each"


def test_a_table_leaves_the_rival_to_its_column():
    samples = {"a": {"step": [0.001, 0.001]}, "b": {"step": [0.002, 0.002]}}
    row = ["7", "a", "b", "2", "1.0", "2.0", "**2.000**", "2.000", "2.000 [2.000, 2.000]", "+1.0 [+1.0, +1.0]"]
    assert versus(["7"], samples, "a", "step") == [row]
    assert len(["case", *HEAD]) == len(row)
    assert table(["x"], [["1"]]) == "| x |\n| ---: |\n| 1 |"


def test_what_lena_adds_is_a_line_over_the_tensors():
    def case(ours):
        return {ADAMW: {"step": [1.0] * 3}, LENA["adamw"]: {"step": [ours] * 3}}

    assert added_line({10: case(1.3), 20: case(1.5)}, "step") == approx((0.02, 0.1))


@pytest.mark.parametrize(("count", "elements"), [(1000, 100_000), (100, 30_000), (2, 6)])
def test_a_chain_has_as_many_tensors_as_asked_for_and_stays_finite(count, elements):
    chain = Chain(count, elements)
    chain(torch.randn(4, chain.width)).square().mean().backward()
    parameters = list(chain.parameters())
    assert len(parameters) == count
    assert sum(p.numel() for p in parameters) <= elements < count // 2 * (chain.width + 1) * (chain.width + 2)
    assert all(torch.isfinite(p.grad).all() for p in parameters)


def test_a_profile_has_every_event_in_its_phase():
    def event(name, start, took, device=DeviceType.CPU, annotation=False):
        span = SimpleNamespace(start=start, elapsed_us=lambda: took)
        return SimpleNamespace(
            name=name, time_range=span, self_cpu_time_total=took, device_type=device, is_user_annotation=annotation
        )

    events = [
        event("aten::before", 0, 9), event(MARK + "before", 10, 0),
        event("aten::mul", 11, 2000), event("cuLaunchKernelEx", 12, 1), event(MARK + "step", 4010, 0),
        event("kernel", 20, 3000, DeviceType.CUDA), event("span", 20, 3000, DeviceType.CUDA, annotation=True),
        event("cudaMemcpyAsync", 4011, 1), event(MARK + "rest", 5010, 0),
    ]  # fmt: skip
    found = _mean(events, updates=2)
    assert found["phases"] == {"step": approx([0.5, 0, 0.5, 1.5, 2]), "rest": approx([0, 0.5, 0, 0, 0.5])}
    assert found["device"] == {"kernel": [0.5, 1.5]}
    assert "aten::before" not in found["host"]


def test_peaks_belong_to_the_phase_in_which_they_are_reached():
    def update(lap):
        kept = torch.zeros(1000)
        lap("backward")
        for _ in range(2):
            torch.zeros(3000)
        del kept
        lap("step")

    assert tracked_peaks(update) == {"backward": 4000, "step": 12000}


def test_traffic_beside_the_rivals():
    rows = added_traffic({"reduce": [3.0, 24.0]}, {"reduce": [2.0, 16.0], "send": [1.0, 4.0]})
    assert rows == [["reduce", "3", "24", "+1", "+8"], ["send", "0", "0", "-1", "-4"]]


def test_the_network_is_fitted_to_its_own_all_reduces():
    network = {"hop_inside_s": 2e-4, "hop_between_s": 2e-4, "bandwidth_inside": 1e9, "bandwidth_between": 1e9}
    known = replace(MACHINES["cpu-2-cores"], collective_s=1e-4, turn_s=0.0, cores=2, **network)
    times = {r: {n: all_reduce_seconds(16 * n + 16, r, known) if r > 1 else 1e-4 for n in LAYERS} for r in (1, 2, 4)}
    found = fitted(MACHINES["cpu-2-cores"], times)
    assert (found.collective_s, found.hop_inside_s) == approx((1e-4, 2e-4), rel=0.05)
    assert found.bandwidth_inside == approx(1e9, rel=0.05)


# -- optimizers --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_had_is_named(capsys):
    assert available([ADAMW, FUSED_ADAM], CPU) == rivals("adamw", CPU) == [ADAMW]
    assert "left out: DeepSpeed FusedAdam: for parameters on a GPU only" in capsys.readouterr().err


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


@pytest.mark.parametrize("name", [ADAMW, LENA["adamw"]])
def test_ready_made_gradients_are_added_and_move_the_weights(name):
    gradients = [vector(1, -2, 0.5), vector(0.1, 0.2)]
    weights = [torch.ones_like(gradient) for gradient in gradients]
    warm_up({name: ready_made(name, weights, gradients)}, updates=3)
    assert torch.equal(weights[0].grad, 3 * gradients[0])
    assert all(((1 - weight) * gradient > 0).all() for weight, gradient in zip(weights, gradients, strict=True))


# -- the suite ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def suite(monkeypatch):
    """Runs the suite without its benchmarks, of which "footprint" fails; their command lines are in `started`."""

    def run(command, **_):
        suite.started.append(command[2:])
        return subprocess.CompletedProcess(command, int("benchmarks.footprint" in command), stdout="a table\n")

    def suite(*words):
        monkeypatch.setattr(sys, "argv", ["benchmarks", *words])
        return suite_module.main()

    suite.started = []
    monkeypatch.setattr(subprocess, "run", run)
    return suite


def test_the_suite_runs_what_is_named(suite, tmp_path):
    assert suite("hooks", "example", "--quick", "--out", str(tmp_path)) == 0
    hooks, example = suite.started
    assert hooks[:3] == ["benchmarks.engines", "--quick", "--ranks"] and hooks[-1] == str(tmp_path / "hooks.json")
    assert example == ["benchmarks.example", "--quick", "--out", str(tmp_path / "example.json")]
    assert (tmp_path / "hooks.md").read_text() == "## hooks\n\na table\n"


def test_what_failed_is_named_and_leaves_no_numbers_of_an_earlier_run(suite, tmp_path, capsys):
    (tmp_path / "footprint.md").write_text("old"), (tmp_path / "footprint.json").write_text("old")
    assert suite("footprint", "engines", "--out", str(tmp_path)) == 1
    assert "failed, see their messages: footprint" in capsys.readouterr().err
    assert [path.name for path in Path(tmp_path).iterdir()] == ["engines.md"]


def test_an_unknown_benchmark_is_refused(suite, capsys):
    with pytest.raises(SystemExit):
        suite("speed")
    assert "speed: not one of optimizers, engines" in capsys.readouterr().err
