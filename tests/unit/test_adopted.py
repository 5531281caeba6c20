"""LENA in the hands of an engine: a stand-in with one flat tensor, two parameters and padding in it."""

import pytest
import torch
from pytest import approx

import ds_lena
from ds_lena import LENA, StateError
from ds_lena.optimizer import dormant
from ds_lena.shards import Segment
from tests.unit.support import backward, vector, weights

MICRO_GRADIENTS = [[vector(3, 0), vector(1, 2, 3)], [vector(1, 0), vector(1, 2, 3)]]  # gains 5/4 and 1
SGD = {"base": "sgd", "momentum": 0, "lr": 0.1, "warmup": "none", "max_relative_gain": None}


class StandIn:
    """The second parameter first, one element of padding, then the first parameter."""

    group = None

    def __init__(self, lena):
        self.lena = lena
        self.flat = torch.zeros(6, dtype=torch.float64)

    def segments(self):
        return [(self.flat, [Segment(1, start=0, length=3, offset=0), Segment(0, start=4, length=2, offset=0)])]

    def squares_of_mean(self):
        return torch.stack([p.grad.double().square().sum() for p in self.lena.parameters])

    def gradients(self):
        return enumerate(p.grad for p in self.lena.parameters)

    def clip_coefficient(self, norm):
        return None

    def lay_out_gradient(self):
        first, second = (p.grad for p in self.lena.parameters)
        self.flat.grad = torch.cat([second, vector(77), first])

    def shape(self, parameter):
        return self.lena.parameters[parameter].shape

    def micro_batch_size(self):
        return 4

    def planned_n(self):
        return 2

    def total_steps(self):
        return 50

    def watch_passes(self, probe):
        pass


@pytest.fixture
def lena():
    return LENA(weights(2, 3), **SGD)


@pytest.fixture
def engine(lena):
    engine = StandIn(lena)
    lena.adopt(engine, names=["head.bias", "body.weight"], order=[1, 0])
    lena.param_groups[0]["params"] = [engine.flat]
    return engine


def window(lena):
    """Two passes, each loss divided by their number as an engine does."""
    for parameter in lena.parameters:
        parameter.grad = None
    for gradients in MICRO_GRADIENTS:
        backward(lena.parameters, [gradient / len(MICRO_GRADIENTS) for gradient in gradients])


def gains(lena):
    return {name: layer["gain"] for name, layer in ds_lena.report(lena)["layers"].items()}


def test_layers_have_the_engine_s_names_in_the_order_of_the_model(lena, engine):
    assert list(gains(lena)) == ["body.weight", "head.bias"]


def test_one_update_around_the_engine_s_step(lena, engine):
    window(lena)
    engine.lay_out_gradient()
    lena.begin_update()
    lena.step()
    lena.end_update(applied=True)
    assert gains(lena) == approx({"body.weight": 1, "head.bias": 5 / 4}, rel=1e-7)
    expected = -0.1 * torch.cat([vector(1, 2, 3), vector(0), 5 / 4 * vector(2, 0)])
    torch.testing.assert_close(engine.flat, expected, rtol=1e-7, atol=1e-15)


def test_a_step_for_every_group_is_one_update(lena, engine):
    window(lena)
    engine.lay_out_gradient()
    lena.begin_update()
    for _ in range(3):
        lena.step()
    lena.end_update(applied=True)
    assert lena.tracker.updates == 1
    assert gains(lena)["head.bias"] == approx(5 / 4)


def test_an_update_that_the_engine_throws_away_leaves_nothing(lena, engine):
    window(lena)
    lena.begin_update()
    lena.end_update(applied=False)
    assert ds_lena.report(lena)["skipped"] == 1
    assert lena.tracker.updates == 0
    window(lena)
    lena.begin_update()
    lena.end_update(applied=True)
    assert ds_lena.report(lena)["n"] == 2
    assert gains(lena)["head.bias"] == approx(5 / 4)


def test_a_step_outside_of_an_update_is_an_error(lena, engine):
    window(lena)
    with pytest.raises(StateError, match=r"call engine\.step\(\)"):
        lena.step()


def test_a_dormant_optimizer_does_not_move(lena, engine):
    window(lena)
    engine.lay_out_gradient()
    with dormant():
        assert lena.step() is None
    assert not engine.flat.any()
    assert lena.tracker.updates == 0


def test_the_engine_s_zero_grad_does_not_end_the_window(lena, engine):
    window(lena)
    lena.zero_grad()
    window(lena)
    assert lena.begin_update().measured.n == 4


def test_the_engine_s_micro_batch_size_and_length_of_run_are_known(lena, engine):
    window(lena)
    plan = lena.begin_update().plan
    assert (plan.total_steps, plan.planned_n, plan.micro_batch_size) == (50, 2, 4)
