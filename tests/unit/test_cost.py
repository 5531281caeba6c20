"""The cost model: cases computed by hand, what must grow with what, what LENA really does, and the command."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import ds_lena.grad_stats.statistics
from benchmarks.memory_worker import live_bytes
from ds_lena import LENA, ConfigError
from ds_lena.cost import MACHINES, Job, Machine, estimate
from ds_lena.cost.__main__ import main
from ds_lena.cost.job import blocks_of, tensors_of
from ds_lena.cost.machines import CONSTANTS
from ds_lena.cost.model import DEVICE_BYTES_PER_LAYER, all_reduce_seconds, collective_bytes
from ds_lena.cost.report import seconds, size
from ds_lena.grad_stats.statistics import sum_over
from ds_lena.keys import BASES

ROUND = Machine(
    hook_s=1.0, norm_s=2.0, call_s=3.0, update_s=5.0, layer_s=0.5, memory_bandwidth=100.0, flops=1000.0,
    collective_s=7.0, hop_inside_s=1.0, hop_between_s=10.0, bandwidth_inside=1000.0, bandwidth_between=100.0,
    ranks_per_node=4, cores=0, turn_s=0.0, note="numbers that are easy to reckon with",
)  # fmt: skip

SMALL = {"params": 1000, "tensors": 10, "tokens": 2, "precision": "fp32"}
STAGES = range(4)


# -- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "blocks"), [(1e9, 17), (7e9, 33), (70e9, 71), (175e9, 96), (405e9, 127), (1e12, 172), (1, 1)]
)
def test_blocks_of_a_gpt(params, blocks):
    assert blocks_of(params) == blocks
    assert tensors_of(params) == 12 * blocks + 4


def test_the_rule_gives_the_tensors_of_gpt_2():
    assert tensors_of(12 * (12 * 128**2) * 12**2) == 148


@pytest.mark.parametrize(
    ("stage", "replicas", "measured", "moved"),
    [
        *((0, 1, 10, 10), (1, 1, 10, 10), (3, 1, 10, 10)),
        *((0, 4, 3, 10), (1, 4, 4, 4), (2, 4, 4, 4), (3, 4, 10, 10)),
        *((0, 100, 1, 10), (2, 100, 2, 2), (3, 100, 10, 10)),
    ],
)
def test_pieces_of_a_rank(stage, replicas, measured, moved):
    job = Job(ranks=replicas, stage=stage, **SMALL)
    assert (job.measured_pieces, job.moved_pieces) == (measured, moved)


def test_tensor_and_pipeline_parallelism_share_a_replica():
    job = Job(ranks=24, tensor_parallel=2, pipeline_parallel=3, stage=3, **SMALL)
    assert (job.replicas, job.local_tensors) == (4, 4)
    assert job.local_params == 1000 / 6
    assert job.owned_params == 1000 / 24


# -- what LENA adds ---------------------------------------------------------------------------------------------------


def test_a_case_by_hand():
    cost = estimate(Job(ranks=4, stage=2, accumulation=3, **SMALL), ROUND)
    assert dataclasses.astuple(cost.hooks) == (30, 12000, 12000 / 100 + 30 * 1.0)
    assert dataclasses.astuple(cost.average) == (4, 1000, 1000 / 100 + 4 * 2.0)
    assert cost.factors.seconds == 5 + 10 * 0.5
    assert dataclasses.astuple(cost.calls) == (3, 0, 3 * 3.0)
    assert cost.trust.count == cost.trust.seconds == 0
    statistics = 8 * (2 + 2 * 10)
    assert dataclasses.astuple(cost.collectives)[:2] == (1, statistics)
    assert cost.collectives.seconds == pytest.approx(7 + 2 * 3 * 1.0 + 2 * statistics * 3 / 4 / 1000)
    assert cost.seconds == pytest.approx(sum(part.seconds for part in cost.parts.values()))
    assert cost.share == pytest.approx(cost.seconds / cost.stock.seconds)


def test_stock_by_hand():
    stock = estimate(Job(ranks=4, stage=2, accumulation=3, **SMALL), ROUND).stock
    assert stock.forward_backward_s == 6 * 1000 * 2 * 3 / 1000
    assert stock.sent_bytes == 4 * 4000 * 3 / 4  # three reductions and one gathering
    assert stock.communication_s == 12000 / 1000
    assert stock.optimizer_bytes == 250 * 28
    assert stock.state_bytes == 250 * 8 + 250 * 4 + 1000 * 4
    assert stock.seconds == 36 + 70


@pytest.mark.parametrize(("stage", "times"), [(0, 2), (1, 2), (2, 4), (3, 9)])
def test_what_a_stage_sends(stage, times):
    job = Job(ranks=4, stage=stage, accumulation=3, **SMALL)
    assert estimate(job, ROUND).stock.sent_bytes == times * 4000 * 3 / 4


@pytest.mark.parametrize(("stage", "of_a_param"), [(0, 16), (1, 4 + 3), (2, 2 + 3.5), (3, 4)])
def test_state_in_bf16(stage, of_a_param):
    job = Job(ranks=4, stage=stage, **SMALL | {"precision": "bf16"})
    assert estimate(job, ROUND).stock.state_bytes == of_a_param * 1000


@pytest.mark.parametrize(("base", "size"), [("lars", 3000), ("lamb", 4000)])
def test_lars_and_lamb_have_one_more_all_reduce_and_two_more_passes(base, size):
    cost = estimate(Job(ranks=4, base=base, **SMALL), ROUND)
    assert collective_bytes(Job(ranks=4, base=base, **SMALL)) == [8 * 22, 8 * 2 * 10]
    assert cost.collectives.count == 2
    assert dataclasses.astuple(cost.trust) == (8, size, size / 100 + 8 * 2.0)


def test_one_rank_has_no_collective():
    cost = estimate(Job(ranks=1, base="lamb", **SMALL), ROUND)
    assert dataclasses.astuple(cost.collectives) == (0, 0, 0)
    assert cost.stock.sent_bytes == 0


def test_the_statistics_run_over_all_ranks_of_a_pipeline_too():
    job = Job(ranks=8, tensor_parallel=2, pipeline_parallel=4, **SMALL)
    assert job.replicas == 1
    assert collective_bytes(job) == [8 * 22]


# -- the all-reduce ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "hops"),
    [(1, None), (2, 2 * 1), (4, 2 * 3), (5, 2 * (3 + 10)), (8, 2 * (3 + 10)), (16, 2 * (3 + 20)), (20, 2 * (3 + 30))],
)
def test_latency_of_an_all_reduce(ranks, hops):
    assert all_reduce_seconds(0, ranks, ROUND) == (0 if hops is None else 7 + hops)


def test_a_tree_wins_at_scale_and_a_ring_for_large_buffers():
    far = dataclasses.replace(ROUND, ranks_per_node=1)
    assert all_reduce_seconds(0, 1024, far) == 7 + 2 * 10 * 10
    assert all_reduce_seconds(100, 2, far) == 7 + 2 * 10 + 2 * 100 / 2 / 100


def test_ranks_on_one_core_wait_for_their_turn():
    shared = dataclasses.replace(ROUND, ranks_per_node=100, cores=2, turn_s=4.0)
    assert [shared.crowding(ranks) for ranks in (1, 2, 4, 8)] == [1, 1, 2, 4]
    assert all_reduce_seconds(0, 2, shared) == 7 + 2 * 1
    assert all_reduce_seconds(0, 8, shared) == 7 + 2 * 7 * (1 + 4.0 * 3)
    alone, crowd = (estimate(Job(ranks=8, **SMALL), machine) for machine in (ROUND, shared))
    for name in ("hooks", "average", "factors", "calls"):
        assert crowd.parts[name].seconds == 4 * alone.parts[name].seconds


# -- what must grow with what -----------------------------------------------------------------------------------------

SIZES = (1e9, 7e9, 70e9, 405e9, 1e12)
RANKS = (8, 64, 512, 4096, 16384)


def added(**job):
    return estimate(Job(**job), MACHINES["h100"])


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", RANKS)
def test_larger_models_cost_more(stage, ranks):
    costs = [added(params=params, ranks=ranks, stage=stage) for params in SIZES]
    for part in ("hooks", "average", "collectives", "factors", "calls"):
        times = [cost.parts[part].seconds for cost in costs]
        assert times == sorted(times)
    assert all(a.seconds < b.seconds for a, b in pairwise(costs))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("params", SIZES)
def test_more_ranks_cost_latency_only(stage, params):
    costs = [added(params=params, ranks=ranks, stage=stage) for ranks in RANKS]
    assert len({cost.hooks for cost in costs}) == len({cost.collectives.bytes for cost in costs}) == 1
    latencies = [cost.collectives.seconds for cost in costs]
    assert latencies == sorted(latencies)
    averages = [cost.average.seconds for cost in costs]
    assert averages == sorted(averages, reverse=True)


@pytest.mark.parametrize("stage", STAGES)
def test_longer_updates_make_the_share_smaller(stage):
    """Where arithmetic hides the communication. Where it does not, accumulation may make the share larger."""
    fast = dataclasses.replace(MACHINES["h100"], bandwidth_between=1e15)

    def share(**job):
        return estimate(Job(params=7e9, ranks=64, stage=stage, **job), fast).share

    assert share(tokens=8192) < share(tokens=4096)
    assert share(accumulation=8) < share()


@pytest.mark.parametrize("constant", CONSTANTS)
def test_every_constant_counts(constant):
    machine = dataclasses.replace(ROUND, cores=2, turn_s=1.0)
    other = dataclasses.replace(machine, **{constant: 2 * getattr(machine, constant)})
    job = Job(ranks=8, stage=3, **SMALL)
    inside = Job(ranks=4, stage=3, **SMALL)
    assert any(estimate(one, machine) != estimate(one, other) for one in (job, inside))


# -- what the library does --------------------------------------------------------------------------------------------


def train(parameters, optimizer, updates):
    for _ in range(updates):
        for _ in range(2):
            sum((p * torch.randn_like(p)).sum() for p in parameters).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(("tensors", "layer"), [(1, "tensor"), (7, "tensor"), (7, "model")])
def test_the_bytes_are_those_of_the_buffer_that_lena_reduces(monkeypatch, tensors, layer):
    reduced = []

    def watched(buffer, group):
        reduced.append(buffer.numel() * buffer.element_size())
        return sum_over(buffer, group)

    monkeypatch.setattr(ds_lena.grad_stats.statistics, "sum_over", watched)
    parameters = [nn.Parameter(torch.zeros(3)) for _ in range(tensors)]
    train(parameters, LENA(parameters, layer=layer, total_steps=9), updates=2)
    layers = 1 if layer == "model" else tensors
    assert reduced == 2 * collective_bytes(Job(params=9, ranks=2, tensors=tensors, layers=layers))


def test_the_memory_of_a_layer_is_within_its_bound():
    def kept(layers):
        before = live_bytes()
        parameters = [nn.Parameter(torch.zeros(1)) for _ in range(layers)]
        optimizer = LENA(parameters, total_steps=9)
        train(parameters, optimizer, updates=2)
        gc.collect()
        moments = sum(4 for state in optimizer.state.values() for _ in state)
        return live_bytes() - before - 4 * layers - moments

    few, many = 10, 510
    of_a_layer = (kept(many) - kept(few)) / (many - few)
    assert DEVICE_BYTES_PER_LAYER / 4 < of_a_layer <= DEVICE_BYTES_PER_LAYER


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table(capsys):
    assert main(["--params", "70e9", "--ranks", "1024", "--stage", "3"]) == 0
    out = capsys.readouterr().out
    assert "7e+10 parameters (71 blocks, 856 tensors, 856 layers), bf16" in out
    assert "1,024 ranks = 1024 data x 1 tensor x 1 pipeline, ZeRO-3" in out
    assert "NOT measured" in out
    assert "all-reduce" in out and "together" in out


def test_the_command_says_what_is_not_supported(capsys):
    assert main(["--params", "1e9", "--ranks", "8", "--tensor-parallel", "4"]) == 0
    assert "LENA refuses tensor and pipeline parallelism" in capsys.readouterr().out
    assert main(["--params", "1e9", "--ranks", "8", "--base", "lamb", "--machine", "cpu-2-cores"]) == 0
    out = capsys.readouterr().out
    assert "4 ranks share a core" in out and "norms for the trust ratio" in out


def test_json_holds_everything(capsys):
    arguments = ["--params", "1e9", "--ranks", "64", "--accumulation", "2", "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    cost = estimate(Job(params=1e9, ranks=64, accumulation=2), MACHINES["h100"])
    assert found["added_seconds"] == cost.seconds
    assert found["share"] == cost.share
    assert found["collective_bytes"] == [3344]
    assert found["lena"]["hooks"] == dataclasses.asdict(cost.hooks) | {"share": cost.hooks.seconds / cost.stock.seconds}
    assert found["job"]["tensors"] == 208
    assert found["stock"]["seconds"] == cost.stock.seconds


def test_several_sizes_make_a_table_of_markdown(capsys):
    assert main(["--params", "1e9", "1e12", "--ranks", "8", "64", "512"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 6
    assert len({line.count("|") for line in lines}) == 1
    assert main(["--params", "1e9", "--ranks", "8", "64", "--json"]) == 0
    assert [one["job"]["ranks"] for one in json.loads(capsys.readouterr().out)] == [8, 64]


@pytest.mark.parametrize("constant", CONSTANTS)
def test_every_constant_can_be_given(constant, capsys):
    assert main(["--params", "1e9", "--ranks", "8", f"--{constant.replace('_', '-')}", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["machine"][constant] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--params 0 --ranks 8", '"params": 0.0 is not allowed; allowed is a number from 1 to 1e+15.'),
        ("--params=-1e9 --ranks 8", '"params": -1000000000.0 is not allowed; allowed is a number from 1 to 1e+15.'),
        ("--params nan --ranks 8", '"params": nan is not allowed; allowed is a number from 1 to 1e+15.'),
        ("--params inf --ranks 8", '"params": inf is not allowed; allowed is a number from 1 to 1e+15.'),
        ("--params 1e9 --ranks 0", '"ranks": 0 is not allowed; allowed is a whole number from 1 to 1e+15.'),
        ("--params 1e9 --ranks 8 --tokens 0", '"tokens": 0.0 is not allowed; allowed is a number from 1 to 1e+15.'),
        ("--params 1e9 --ranks 8 --stage 4", '"stage": 4 is not allowed; allowed is one of 0, 1, 2, 3.'),
        ("--params 1e9 --ranks 8 --base adam", "\"base\": 'adam' is not allowed; allowed is one of adamw, sgd, "),
        ("--params 1e9 --ranks 8 --precision fp8", "allowed is one of fp32, bf16."),
        (
            "--params 1e9 --ranks 12 --tensor-parallel 4 --pipeline-parallel 2",
            '"ranks": 12 is not allowed; allowed is a multiple of tensor_parallel x pipeline_parallel = 8.',
        ),
        ("--params 1e9 --ranks 8 --tensors 4 --pipeline-parallel 8", "allowed is at most the number of tensors, 4."),
        ("--params 1e9 --ranks 8 --tensors 4 --layers 5", '"layers": 5 is not allowed; allowed is at most'),
        ("--params 1e9 --ranks 8 --flops 0", '"flops": 0.0 is not allowed; allowed is a number > 0.'),
        ("--params 1e9 --ranks 8 --cores -1", '"cores": -1 is not allowed; allowed is a whole number >= 0.'),
        ("--params 1e9 --ranks 2.5", "--ranks: '2.5' is not allowed; allowed is a whole number."),
        ("--params many --ranks 8", "--params: 'many' is not allowed; allowed is a number, such as 70e9."),
        ("--params 1e9", "required: --ranks."),
        ("--params 1e9 --ranks 8 --machine abacus", "choose from"),
        ("--params 1e9 --ranks 8 --stages 3", "unrecognized arguments: --stages 3."),
    ],
)
def test_what_is_not_allowed_is_one_message_and_exit_code_2(arguments, message, capsys):
    try:
        code = main(arguments.split())
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    assert code == 2
    assert said.out == ""
    assert said.err.startswith("LENA: ") and message in said.err
    assert said.err.count("\n") == 1


def test_the_library_raises_the_same_error():
    with pytest.raises(ConfigError, match='"stage": 5'):
        Job(params=1e9, ranks=8, stage=5)


@pytest.mark.parametrize("base", BASES)
def test_every_base_rule_of_the_configuration_has_a_cost(base):
    assert 0 < added(params=1e9, ranks=8, base=base).seconds < math.inf


def test_it_runs_as_a_module():
    command = [sys.executable, "-m", "ds_lena.cost", "--params", "1e9", "--ranks", "0"]
    root = Path(ds_lena.__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == 'LENA: "ranks": 0 is not allowed; allowed is a whole number from 1 to 1e+15.\n'


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 µs"), (3.2e-7, "0.32 µs"), (1.5e-5, "15 µs"), (0.0204, "20.4 ms"), (12.3, "12.3 s")]
)
def test_times_in_words(value, text):
    assert seconds(value) == text


@pytest.mark.parametrize(("value", "text"), [(0, ""), (776, "776 B"), (13704, "13.7 kB"), (1.4e11, "140 GB")])
def test_sizes_in_words(value, text):
    assert size(value) == text
