"""The oracle checked by hand: numbers that follow from the method's sentences without a computer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tests.helpers.oracle import Oracle, complete, layer_of
from tests.helpers.reference import Settings, Window, train

NO_WARMUP = {"warmup": "none", "gain_power": 1.0, "max_relative_gain": None, "smoothing": 0.0}


def oracle(layers=("a",), **keys):
    return Oracle(dict.fromkeys(layers, 1), complete({"total_steps": 100} | keys))


def gain(n, a, b, **keys):
    """The gain of one layer after one update."""
    one = oracle(**(NO_WARMUP | keys))
    return one.update({"a": a}, {"a": b}, n, 1)["a"]


def test_orthogonal_micro_gradients_of_one_norm_give_n():
    assert gain(8, a=1.0, b=1 / 8) == pytest.approx(8, rel=1e-6)


def test_equal_micro_gradients_give_1():
    assert gain(8, a=1.0, b=1.0) == pytest.approx(1)


def test_opposite_micro_gradients_give_n():
    assert gain(2, a=1.0, b=0.0) == pytest.approx(2, rel=1e-6)  # the signal is negative, and counts as 0


def test_the_gain_is_a_over_b():
    assert gain(4, a=3.0, b=2.0) == pytest.approx(1.5, rel=1e-6)


def test_one_micro_gradient_measures_nothing():
    one = oracle(**NO_WARMUP)
    assert one.update({"a": 1.0}, {"a": 1.0}, 1, 1) == {"a": 1.0}
    assert one.layers["a"].weight == 0


def test_a_larger_base_batch_divides_the_noise():
    """s2 = 8/7 x 7/8 = 1, m2 = 0: all noise, so the gain is n/k."""
    assert gain(8, a=1.0, b=1 / 8, base_batch_size=4) == pytest.approx(2, rel=1e-6)


@pytest.mark.parametrize(("scaling", "expected"), [("linear", 8), ("sqrt", 8**0.5), ("none", 1)])
def test_fixed_scalings_still_measure(scaling, expected):
    one = oracle(**(NO_WARMUP | {"scaling": scaling, "gain_power": 3.0}))
    assert one.update({"a": 1.0}, {"a": 0.5}, 8, 1)["a"] == pytest.approx(expected)
    assert one.report()["gain"] == pytest.approx(2)


def test_power_and_largest_factor():
    assert gain(4, a=4.0, b=1.0, gain_power=0.5) == pytest.approx(2, rel=1e-6)
    assert gain(4, a=4.0, b=1.0, max_factor=3.0) == 3


def test_averages_are_debiased_from_the_first_update_on():
    one = oracle(warmup="none", smoothing=0.9)
    one.update({"a": 3.0}, {"a": 2.0}, 4, 1)
    layer = one.report()["layers"]["a"]
    assert (layer["noise"], layer["signal"]) == (pytest.approx(4 / 3), pytest.approx(5 / 3))


def test_the_papers_smoothing_is_1_minus_n_over_1000():
    one = oracle(warmup="none")
    for a, b in ((3.0, 2.0), (5.0, 3.0)):
        one.update({"a": a}, {"a": b}, 250, 1)
    signals = [b - 250 / 249 * (a - b) / 250 for a, b in ((3.0, 2.0), (5.0, 3.0))]
    expected = (0.75 * 0.25 * signals[0] + 0.25 * signals[1]) / (0.75 * 0.25 + 0.25)
    assert one.report()["layers"]["a"]["signal"] == pytest.approx(expected)


def test_noise_follows_the_micro_batch_size():
    one = oracle(**(NO_WARMUP | {"smoothing": 0.5}))
    one.update({"a": 2.0}, {"a": 1.0}, 2, 1)  # s2 = 2
    one.update({"a": 1.0}, {"a": 1.0}, 2, 4)  # s2 = 0, and the 2 has become 1/2
    assert one.report()["layers"]["a"]["noise"] == pytest.approx((0.25 * 0.5 + 0) / 0.75)


def test_a_gain_is_bounded_by_a_multiple_of_the_models():
    """Layer a is all noise, b all signal, alike in size: the model has s2 = m2 = 1, a gain of 2 / (1/8 + 1)."""
    two = oracle(("a", "b"), warmup="none", gain_power=1.0, max_relative_gain=1.5)
    factors = two.update({"a": 1.0, "b": 1.0}, {"a": 1 / 8, "b": 1.0}, 8, 1)
    assert two.report()["gain"] == pytest.approx(16 / 9)
    assert factors == {"a": pytest.approx(1.5 * 16 / 9), "b": pytest.approx(1)}


def test_warm_up_by_gain_and_by_the_cap():
    """n = 4 throughout, T = 10, so H = 40, theta = 8 and the cap at 16: gain 4 needs 2 updates, gain 1 needs 8, but is
    let go after 4."""
    two = oracle(("a", "b"), total_steps=10, warmup_fraction=0.2, warmup_cap=0.4, max_relative_gain=None)
    seen = []
    for _ in range(5):
        two.update({"a": 1.0, "b": 1.0}, {"a": 1 / 4, "b": 1.0}, 4, 1)
        seen.append([two.layers[name].warmup for name in "ab"])
    assert seen == [
        [pytest.approx(f, rel=1e-6) for f in row] for row in ((0.5, 0.25), (1, 0.5), (1, 0.75), (1, 1), (1, 1))
    ]
    assert [two.layers[name].capped for name in "ab"] == [False, True]


def test_an_unused_layer_waits_but_the_cap_goes_on():
    two = oracle(("a", "b"), total_steps=10, warmup_fraction=0.2, warmup_cap=0.4)
    two.update({"a": 1.0, "b": 0.0}, {"a": 0.5, "b": 0.0}, 4, 1)
    b = two.report()["layers"]["b"]
    assert (b["gain"], b["state"], b["warmup"]) == (1, 0, pytest.approx(4 / 16))
    assert b["noise_scale"] == math.inf


def test_a_layer_that_is_not_finite_keeps_everything():
    two = oracle(("a", "b"), total_steps=10)
    two.update({"a": 1.0, "b": 1.0}, {"a": 0.5, "b": 0.25}, 4, 1)
    before = two.report()["layers"]["b"]
    two.update({"a": 1.0, "b": math.inf}, {"a": 0.5, "b": math.nan}, 4, 1)
    assert two.report()["layers"]["b"] == before
    assert two.report()["nonfinite"] == 1


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ("tensor", ["scale", "h.0.up.weight", "h.0.up.bias"]),
        ("module", ["root", "h.0.up", "h.0.up"]),
        ("block", ["root", "h.0", "h.0"]),
        ("model", ["model", "model", "model"]),
    ],
)
def test_layers(layer, expected):
    assert [layer_of(name, layer) for name in ("scale", "h.0.up.weight", "h.0.up.bias")] == expected


class Point(nn.Module):
    """The loss is the product of the weight and the batch: the batch is the gradient."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, gradient):
        return self.weight @ gradient


def first_step(batches, **keys):
    model = Point()
    groups = [{"params": list(model.named_parameters())}]
    keys = {"lr": 1.0, "base": "sgd", "momentum": 0.0, "warmup": "none", "max_relative_gain": None} | keys
    window = Window([[(torch.tensor(g, dtype=torch.float64),) for g in rank] for rank in batches], len(batches[0]), 1)
    (snapshot,) = train(model, groups, keys, [window], Settings())
    return snapshot


@pytest.mark.parametrize("ranks", [1, 2])
def test_training_measures_over_ranks_and_micro_batches(ranks):
    """Gradients (1, 0) and (0, 1): A = 1, B = 1/2, gain 2, so one step is the sum of both."""
    gradients = [[1.0, 0.0], [0.0, 1.0]]
    snapshot = first_step([gradients] if ranks == 1 else [[each] for each in gradients])
    torch.testing.assert_close(snapshot.params["weight"], torch.zeros(2, dtype=torch.float64), atol=1e-7, rtol=0)
    assert snapshot.report["n"] == 2


def test_weight_decay_has_the_factor_too():
    snapshot = first_step([[[1.0, 0.0], [0.0, 1.0]]], weight_decay=0.25, lr=0.5)
    expected = 1 - 0.5 * 2 * (0.5 + 0.25)
    torch.testing.assert_close(snapshot.params["weight"], torch.full((2,), expected, dtype=torch.float64))
