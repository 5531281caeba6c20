"""The cost model: cases computed by hand, what must grow with what, what LENA really does, and the command."""

import dataclasses
import gc
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import ds_lena
from benchmarks.footprint import live_bytes
from ds_lena import LENA, ConfigError
from ds_lena.cost import (
    CONSTANTS,
    MACHINES,
    MEMORY_PER_LAYER,
    Job,
    Machine,
    all_reduce_seconds,
    collective_bytes,
    estimate,
    in_bytes,
    in_seconds,
    main,
)
from ds_lena.keys import BASES

ROUND = Machine(
    hook_s=1.0, norm_s=2.0, call_s=3.0, update_s=5.0, layer_s=0.5, memory_bandwidth=100.0, flops=1000.0,
    collective_s=7.0, hop_inside_s=1.0, hop_between_s=10.0, bandwidth_inside=1000.0, bandwidth_between=100.0,
    ranks_per_node=4, cores=0, turn_s=0.0, note="numbers that are easy to reckon with",
)  # fmt: skip

SMALL = {"params": 1000, "tensors": 10, "tokens": 2, "precision": "fp32"}
STAGES = range(4)


@pytest.mark.parametrize(
    ("params", "blocks"), [(1e9, 17), (7e9, 33), (175e9, 96), (405e9, 127), (1, 1), (12 * (12 * 128**2) * 12**2, 12)]
)
def test_tensors_of_a_gpt(params, blocks):
    assert Job(params=max(params, 16), ranks=1).all_tensors == 12 * blocks + 4


@pytest.mark.parametrize(
    ("stage", "replicas", "measured", "moved"),
    [
        *((0, 1, 10, 10), (1, 1, 10, 10), (3, 1, 10, 10)),
        *((0, 4, 3, 10), (1, 4, 4, 4), (2, 4, 4, 4), (3, 4, 10, 10)),
        *((0, 100, 1, 10), (2, 100, 2, 2), (3, 100, 10, 10)),
    ],
)
def test_pieces_of_a_rank(stage, replicas, measured, moved):
    assert Job(ranks=replicas, stage=stage, **SMALL).pieces == (10, measured, moved)


# -- what LENA adds ---------------------------------------------------------------------------------------------------


def test_a_case_by_hand():
    cost = estimate(Job(ranks=4, stage=2, accumulation=3, **SMALL), ROUND)
    statistics = 8 * (2 + 2 * 10)
    assert {name: dataclasses.astuple(part) for name, part in cost.parts.items()} == {
        "hooks": (30, 12000, 12000 / 100 + 30 * 1.0),
        "average": (4, 1000, 1000 / 100 + 4 * 2.0),
        "collectives": (1, statistics, pytest.approx(7 + 2 * 3 * 1.0 + 2 * statistics * 3 / 4 / 1000)),
        "factors": (1, 0, 5 + 10 * 0.5),
        "calls": (3, 0, 3 * 3.0),
        "trust": (0, 0, 0),
    }
    assert cost.seconds == pytest.approx(sum(part.seconds for part in cost.parts.values()))
    assert cost.share == pytest.approx(cost.seconds / cost.stock["seconds"])


def test_stock_by_hand():
    assert estimate(Job(ranks=4, stage=2, accumulation=3, **SMALL), ROUND).stock == {
        "forward_backward_s": 6 * 1000 * 2 * 3 / 1000,
        "sent_bytes": 4 * 4000 * 3 / 4,  # three reductions and one gathering
        "communication_s": 12000 / 1000,
        "optimizer_bytes": 250 * 28,
        "optimizer_s": 70,
        "state_bytes": 250 * 8 + 250 * 4 + 1000 * 4,
        "seconds": 36 + 70,
    }


def test_tensor_and_pipeline_parallelism_share_a_replica():
    job = Job(ranks=24, tensor_parallel=2, pipeline_parallel=3, stage=3, **SMALL)
    parts = estimate(job, ROUND).parts
    assert (job.replicas, parts["hooks"].count) == (4, 4)
    assert (parts["hooks"].bytes, parts["average"].bytes) == pytest.approx((4000 / 6, 4000 / 24))
    assert collective_bytes(job) == [8 * 22], "over all ranks of the pipeline too"


@pytest.mark.parametrize(("stage", "times", "of_a_param"), [(0, 2, 16), (1, 2, 7), (2, 4, 5.5), (3, 9, 4)])
def test_what_a_stage_sends_and_keeps(stage, times, of_a_param):
    stock = estimate(Job(ranks=4, stage=stage, accumulation=3, **SMALL | {"precision": "bf16"}), ROUND).stock
    assert stock["sent_bytes"] == times * 2000 * 3 / 4
    assert stock["state_bytes"] == of_a_param * 1000


@pytest.mark.parametrize(("base", "size"), [("lars", 3000), ("lamb", 4000)])
def test_lars_and_lamb_have_one_more_all_reduce_and_two_more_passes(base, size):
    job = Job(ranks=4, base=base, **SMALL)
    parts = estimate(job, ROUND).parts
    assert collective_bytes(job) == [8 * 22, 8 * 2 * 10]
    assert parts["collectives"].count == 2
    assert dataclasses.astuple(parts["trust"]) == (8, size, size / 100 + 8 * 2.0)


def test_one_rank_has_no_collective():
    cost = estimate(Job(ranks=1, base="lamb", **SMALL), ROUND)
    assert dataclasses.astuple(cost.parts["collectives"]) == (0, 0, 0)
    assert cost.stock["sent_bytes"] == 0


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
    alone, crowd = (estimate(Job(ranks=8, **SMALL), machine).parts for machine in (ROUND, shared))
    for name in ("hooks", "average", "factors", "calls"):
        assert crowd[name].seconds == 4 * alone[name].seconds


@pytest.mark.parametrize("stage", STAGES)
def test_larger_models_cost_more_and_more_ranks_cost_latency_only(stage):
    h100 = MACHINES["h100"]
    models = [estimate(Job(params=params, ranks=512, stage=stage), h100) for params in (1e9, 7e9, 70e9, 1e12)]
    assert all(a.parts[name].seconds <= b.parts[name].seconds for a, b in pairwise(models) for name in a.parts)
    assert all(a.seconds < b.seconds for a, b in pairwise(models))
    ranks = [estimate(Job(params=7e9, ranks=ranks, stage=stage), h100).parts for ranks in (8, 64, 4096, 16384)]
    for few, many in pairwise(ranks):
        assert (few["hooks"], few["collectives"].bytes) == (many["hooks"], many["collectives"].bytes)
        assert few["collectives"].seconds < many["collectives"].seconds
        assert few["average"].seconds > many["average"].seconds


@pytest.mark.parametrize("constant", CONSTANTS)
def test_every_constant_counts(constant):
    machine = dataclasses.replace(ROUND, cores=2, turn_s=1.0)
    other = dataclasses.replace(machine, **{constant: 2 * getattr(machine, constant)})
    jobs = [Job(ranks=ranks, stage=3, **SMALL) for ranks in (4, 8)]
    assert any(estimate(job, machine) != estimate(job, other) for job in jobs)


@pytest.mark.parametrize("base", BASES)
def test_every_base_rule_of_the_configuration_has_a_cost(base):
    assert 0 < estimate(Job(params=1e9, ranks=8, base=base), MACHINES["h100"]).seconds < 1


def test_the_memory_of_a_layer_is_within_its_bound():
    def kept(layers):
        before = live_bytes()
        parameters = [nn.Parameter(torch.zeros(1)) for _ in range(layers)]
        optimizer = LENA(parameters, total_steps=9)
        for _ in range(2):
            for _ in range(2):
                sum((p * torch.randn_like(p)).sum() for p in parameters).backward()
            optimizer.step()
            optimizer.zero_grad()
        gc.collect()
        moments = sum(4 for state in optimizer.state.values() for _ in state)
        return live_bytes() - before - 4 * layers - moments

    few, many = 10, 510
    of_a_layer = (kept(many) - kept(few)) / (many - few)
    assert MEMORY_PER_LAYER / 4 < of_a_layer <= MEMORY_PER_LAYER


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_the_parts_and_what_to_know(capsys):
    assert main(["--params", "70e9", "--ranks", "1024", "--stage", "3"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("tensors 856", "one H200", "all-reduce", "13.7 kB", "together", "0.72%"))
    words = "--params 1e9 --ranks 8 --base lamb --machine cpu-2-cores --tensor-parallel 4"
    assert main(words.split()) == 0
    out = capsys.readouterr().out
    assert "4 ranks share a core" in out and "norms for the trust ratio" in out


def test_json_holds_everything(capsys):
    assert main(["--params", "1e9", "--ranks", "64", "--accumulation", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    cost = estimate(Job(params=1e9, ranks=64, accumulation=2), MACHINES["h100"])
    assert (found["added_seconds"], found["share"], found["stock"]) == (cost.seconds, cost.share, cost.stock)
    assert found["collective_bytes"] == [3344]
    hooks = cost.parts["hooks"]
    assert found["lena"]["hooks"] == dataclasses.asdict(hooks) | {"share": hooks.seconds / cost.stock["seconds"]}
    assert found["job"]["tensors"] == 208


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
        ("--params nan --ranks 8", '"params": nan is not allowed; allowed is a number from 1 to 1e+15.'),
        ("--params 1e9 --ranks 0", '"ranks": 0 is not allowed; allowed is a whole number from 1 to 1e+15.'),
        ("--params 1e9 --ranks 8 --stage 4", '"stage": 4 is not allowed; allowed is one of 0, 1, 2, 3.'),
        ("--params 1e9 --ranks 8 --base adam", "\"base\": 'adam' is not allowed; allowed is one of adamw, sgd, "),
        ("--params 1e9 --ranks 8 --precision fp8", "allowed is one of fp32, bf16."),
        (
            "--params 1e9 --ranks 12 --tensor-parallel 4 --pipeline-parallel 2",
            '"ranks": 12 is not allowed; allowed is a multiple of tensor_parallel x pipeline_parallel = 8.',
        ),
        ("--params 1e9 --ranks 8 --tensors 4 --pipeline-parallel 8", "allowed is at most the number of tensors, 4."),
        ("--params 9 --ranks 8 --tensors 10", "allowed is at most the number of parameters, 9."),
        ("--params 1e9 --ranks 8 --tensors 4 --layers 5", '"layers": 5 is not allowed; allowed is at most'),
        ("--params 1e9 --ranks 8 --flops 0", '"flops": 0.0 is not allowed; allowed is a number > 0.'),
        ("--params 1e9 --ranks 8 --cores -1", '"cores": -1 is not allowed; allowed is a whole number >= 0.'),
        ("--params 1e9 --ranks inf", "--ranks: 'inf' is not allowed; allowed is a whole number."),
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
    assert (code, said.out) == (2, "")
    assert said.err.startswith("LENA: ") and message in said.err
    assert said.err.count("\n") == 1


def test_the_library_raises_the_same_error():
    with pytest.raises(ConfigError, match='"stage": 5'):
        Job(params=1e9, ranks=8, stage=5)


def test_it_runs_as_a_module():
    command = [sys.executable, "-m", "ds_lena.cost", "--params", "1e9", "--ranks", "0"]
    root = Path(ds_lena.__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == 'LENA: "ranks": 0 is not allowed; allowed is a whole number from 1 to 1e+15.\n'


def test_times_and_sizes_in_words():
    times = {0: "0 µs", 3.2e-7: "0.32 µs", 1.5e-5: "15 µs", 0.0204: "20.4 ms", 12.3: "12.3 s", 4321: "4,321 s"}
    sizes = {0: "", 776: "776 B", 13704: "13.7 kB", 1.4e11: "140 GB"}
    assert {value: in_seconds(value) for value in times} == times
    assert {value: in_bytes(value) for value in sizes} == sizes
