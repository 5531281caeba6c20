"""The warm-up factor: layer by layer, capped, fixed or none."""

import pytest
import torch
from pytest import approx

from ds_lena.schedule import algorithm
from ds_lena.schedule.algorithm import Clock, LayerState
from tests.unit.support import config, scalar, statistics

N, STEPS = 8, 100
NOISE, SIGNAL = (8, 1), (4, 4)  # A and B of a layer of gain 8, and of one of gain 1


def run(updates, layers=(NOISE, SIGNAL), state=None, done=0, steps=STEPS, n=N, **keys):
    """States and factors after a number of updates in which every layer shows the same A and B."""
    keys = config(**({"max_relative_gain": None} | keys))
    state = state or LayerState.start(len(layers), warmup=0.0)
    numel = torch.ones(len(layers), dtype=torch.float64)
    measured = statistics(n, [a for a, _ in layers], [b for _, b in layers])
    for t in range(done + 1, done + updates + 1):
        clock = Clock(done=scalar(t * n), planned=scalar(steps * n))
        state = algorithm.advance(state, measured, clock, 1.0, numel, keys)
    return state


def test_a_layer_moves_from_the_first_update_on_because_its_state_is_added_before_it_is_used():
    state = run(1, warmup_fraction=0.05, warmup_cap=None)
    assert state.progress.tolist() == approx([8, 1], rel=1e-6)
    assert state.warmup.tolist() == approx([8 / 40, 1 / 40], rel=1e-6)


def test_a_layer_of_the_largest_gain_ends_after_the_warm_up_fraction_of_the_run():
    assert run(4, warmup_fraction=0.05).warmup[0].item() == approx(0.8)
    assert run(5, warmup_fraction=0.05).warmup[0].item() == approx(1)


def test_the_cap_ends_a_layer_of_gain_one_after_its_own_share_of_the_run():
    state = run(10, warmup_fraction=0.05, warmup_cap=0.25)
    assert state.warmup[1].item() == approx(10 / 25)
    assert state.capped.tolist() == [False, True]
    assert run(25, warmup_fraction=0.05, warmup_cap=0.25).warmup.tolist() == [1, 1]


def test_a_layer_that_needs_no_help_of_the_cap_is_not_capped():
    # A warm-up as long as the cap, and gain 1 of a largest 1: both terms are the same.
    state = run(3, layers=[(4, 4)], n=1, warmup_fraction=0.25, warmup_cap=0.25)
    assert state.warmup.tolist() == approx([3 / 25])
    assert state.capped.tolist() == [False]


def test_without_a_cap_a_layer_of_gain_one_warms_up_by_its_own_state_alone():
    state = run(25, warmup_fraction=0.05, warmup_cap=None)
    assert state.warmup[1].item() == approx(25 / 40)
    assert not state.capped.any()


def test_a_layer_without_gradient_is_warmed_up_by_the_cap():
    state = run(5, layers=[(0, 0), NOISE], warmup_cap=0.25)
    assert state.warmup[0].item() == approx(5 / 25)
    assert state.capped.tolist() == [True, False]


def test_an_ended_warm_up_stays_ended_when_the_run_turns_out_to_be_longer():
    ended = run(6, warmup_fraction=0.05)
    state = run(1, state=ended, done=6, steps=100 * STEPS, warmup_fraction=0.05)
    assert state.warmup[0].item() == 1
    assert state.warmup[1].item() < ended.warmup[1].item()


def test_what_ended_a_warm_up_is_remembered():
    by_its_state = run(6, warmup_fraction=0.05)
    quiet = run(94, layers=(SIGNAL, SIGNAL), state=by_its_state, done=6, warmup_fraction=0.05, smoothing=0.0)
    assert quiet.warmup.tolist() == [1, 1]
    assert quiet.capped.tolist() == [False, True], "the first layer ended by itself, the second by the cap"


@pytest.mark.parametrize("scaling", ["gain", "linear"])
def test_a_fixed_warm_up_follows_the_run_and_not_the_layers(scaling):
    state = run(2, warmup="fixed", warmup_fraction=0.05, scaling=scaling)
    assert state.warmup.tolist() == approx([2 / 5, 2 / 5])
    assert not state.capped.any()


@pytest.mark.parametrize("scaling", ["linear", "sqrt", "none"])
def test_a_fixed_scaling_makes_the_layer_warm_up_a_fixed_one(scaling):
    layer = run(2, warmup="layer", scaling=scaling, warmup_cap=0.25)
    fixed = run(2, warmup="fixed", scaling=scaling, warmup_cap=0.25)
    assert layer.warmup.tolist() == fixed.warmup.tolist() == approx([2 / 5, 2 / 5])
    assert not layer.capped.any()


def test_no_warm_up_is_a_factor_of_one():
    assert run(1, warmup="none").warmup.tolist() == [1, 1]


@pytest.mark.parametrize("warmup", ["layer", "fixed"])
def test_the_factor_never_exceeds_one(warmup):
    assert run(60, warmup=warmup).warmup.tolist() == [1, 1]
