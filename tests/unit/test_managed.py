"""LENA in the hands of an engine: a stand-in with one flat tensor, two parameters and padding in it."""

from dataclasses import replace

import pytest
import torch
from pytest import approx

import ds_lena
from ds_lena import LENA, StateError
from ds_lena.binding import Binding
from ds_lena.grad_stats.placement import data_parallel
from ds_lena.layouts.layout import Layout, Segment
from ds_lena.optimizer import controller_of, dormant
from ds_lena.schedule.clock import RunPlan
from tests.unit.support import backward, vector, weights

MICRO_GRADIENTS = [[vector(3, 0), vector(1, 2, 3)], [vector(1, 0), vector(1, 2, 3)]]  # gains 5/4 and 1
SGD = {"base": "sgd", "momentum": 0, "lr": 0.1, "warmup": "none", "max_relative_gain": None}


class StandIn(Layout):
    """The second parameter first, one element of padding, then the first parameter."""

    def __init__(self, parameters):
        self.parameters = parameters
        self.flat = torch.zeros(6, dtype=torch.float64)

    def segments(self):
        return [(self.flat, [Segment(1, start=0, length=3, offset=0), Segment(0, start=4, length=2, offset=0)])]

    def gradients(self):
        return enumerate(p.grad for p in self.parameters)

    def lay_out_gradient(self):
        first, second = (p.grad for p in self.parameters)
        self.flat.grad = torch.cat([second, vector(77), first])


@pytest.fixture
def lena():
    return LENA(weights(2, 3), **SGD)


@pytest.fixture
def layout(lena):
    parameters = controller_of(lena).parameters
    layout = StandIn(parameters)
    controller_of(lena).manage(
        Binding(
            layout=layout,
            placements=data_parallel(["head.bias", "body.weight"], [p.shape for p in parameters], replicas=1),
            order=[1, 0],
            group=None,
            run=lambda: RunPlan(total_steps=50, planned_n=2, micro_batch_size=4),
        )
    )
    lena.param_groups[0]["params"] = [layout.flat]
    return layout


def begin(lena):
    return controller_of(lena).begin_update(lena.param_groups, lena.state)


def end(lena, applied):
    controller_of(lena).end_update(applied)


def window(lena):
    """Two passes, each loss divided by their number as an engine does."""
    for parameter in controller_of(lena).parameters:
        parameter.grad = None
    for gradients in MICRO_GRADIENTS:
        backward(controller_of(lena).parameters, [gradient / len(MICRO_GRADIENTS) for gradient in gradients])


def gains(lena):
    return {name: layer["gain"] for name, layer in ds_lena.report(lena)["layers"].items()}


def test_layers_have_the_engine_s_names_in_the_order_of_the_model(lena, layout):
    assert list(gains(lena)) == ["body.weight", "head.bias"]


def test_one_update_around_the_engine_s_step(lena, layout):
    window(lena)
    layout.lay_out_gradient()
    begin(lena)
    lena.step()
    end(lena, applied=True)
    assert gains(lena) == approx({"body.weight": 1, "head.bias": 5 / 4}, rel=1e-7)
    expected = -0.1 * torch.cat([vector(1, 2, 3), vector(0), 5 / 4 * vector(2, 0)])
    torch.testing.assert_close(layout.flat, expected, rtol=1e-7, atol=1e-15)


def test_a_step_for_every_group_is_one_update(lena, layout):
    window(lena)
    layout.lay_out_gradient()
    begin(lena)
    for _ in range(3):
        lena.step()
    end(lena, applied=True)
    assert controller_of(lena).schedule.updates == 1
    assert gains(lena)["head.bias"] == approx(5 / 4)


def test_an_update_that_the_engine_throws_away_leaves_nothing(lena, layout):
    window(lena)
    begin(lena)
    end(lena, applied=False)
    assert ds_lena.report(lena)["skipped"] == 1
    assert controller_of(lena).schedule.updates == 0
    window(lena)
    begin(lena)
    end(lena, applied=True)
    assert ds_lena.report(lena)["n"] == 2
    assert gains(lena)["head.bias"] == approx(5 / 4)


def test_a_step_outside_of_an_update_is_an_error(lena, layout):
    window(lena)
    with pytest.raises(StateError, match=r"call engine\.step\(\)"):
        lena.step()


def test_a_dormant_optimizer_does_not_move(lena, layout):
    window(lena)
    layout.lay_out_gradient()
    with dormant():
        assert lena.step() is None
    assert not layout.flat.any()
    assert controller_of(lena).schedule.updates == 0


def test_the_engine_s_zero_grad_does_not_end_the_window(lena, layout):
    window(lena)
    lena.zero_grad()
    window(lena)
    assert begin(lena).measured.n == 4


def test_the_engine_s_micro_batch_size_and_length_of_run_are_known(lena, layout):
    window(lena)
    plan = begin(lena).clock.plan
    assert (plan.total_steps, plan.planned_n, plan.micro_batch_size) == (50, 2, 4)


def test_the_user_s_length_of_run_comes_before_the_engine_s(lena, layout):
    controller = controller_of(lena)
    controller.config = replace(controller.config, total_steps=30)
    window(lena)
    assert begin(lena).clock.plan.total_steps == 30
