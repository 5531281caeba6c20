"""Sentences about LENA that hold for any gradients, tried on many."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ds_lena
from ds_lena import LENA
from ds_lena.schedule import algorithm
from ds_lena.schedule.algorithm import Clock, LayerState
from tests.unit.support import config, random_gradients, scalar, statistics, train_window, vector, weights

FAR = Clock(done=scalar(1.0), planned=scalar(1e9))
SEEDS = st.integers(0, 2**32 - 1)
BASES = st.sampled_from([0.25, 1.0, 1.5, 4.0])
BOUNDS = st.sampled_from([None, 1.0, 2.0])
SMOOTHINGS = st.sampled_from([None, 0.0, 0.9])
NO_WARMUP = {"warmup": "none", "max_relative_gain": None}


@st.composite
def histories(draw):
    """(n, A, B) of some updates of three layers: B at most A, sizes from nothing to huge."""
    square = st.floats(0, 1e30).filter(lambda x: x == 0 or x > 1e-30)
    one = st.tuples(square, st.floats(0, 1))
    updates = draw(
        st.lists(st.tuples(st.integers(1, 64), st.lists(one, min_size=3, max_size=3)), min_size=1, max_size=6)
    )
    return [(n, [a for a, _ in layers], [a * share for a, share in layers]) for n, layers in updates]


def states(history, k=1.0, scale=1.0, **keys):
    """The state after each update."""
    state = LayerState.start(3, warmup=1.0)
    for n, a, b in history:
        measured = statistics(n, [scale * x for x in a], [scale * x for x in b])
        state = algorithm.advance(state, measured, FAR, k, vector(4, 2, 7), config(warmup="none", **keys))
        yield state


def gains_of(parameters, micro_gradients, **keys):
    """Gains by layer after one update through the optimizer."""
    optimizer = LENA(parameters, **(NO_WARMUP | keys))
    train_window(optimizer, parameters, micro_gradients)
    return [layer["gain"] for layer in ds_lena.report(optimizer)["layers"].values()]


# -- the gain ---------------------------------------------------------------------------------------------------------


@given(histories(), BASES, BOUNDS, SMOOTHINGS)
def test_the_gain_lies_between_one_and_the_largest(history, k, bound, smoothing):
    for (n, _, _), state in zip(history, states(history, k, max_relative_gain=bound, smoothing=smoothing), strict=True):
        assert (state.gain >= 1).all()
        assert (state.gain <= max(n / k, 1)).all()


@given(histories(), BOUNDS, SMOOTHINGS, st.floats(1e-6, 1e6))
def test_the_scale_of_the_loss_does_not_enter_the_gain(history, bound, smoothing, scale):
    keys = {"max_relative_gain": bound, "smoothing": smoothing}
    for one, other in zip(states(history, **keys), states(history, scale=scale**2, **keys), strict=True):
        torch.testing.assert_close(one.gain, other.gain, rtol=1e-6, atol=0)


@given(histories(), st.floats(1.0, 4.0))
def test_a_bound_never_raises_a_gain_and_never_lets_one_through_that_is_larger(history, multiple):
    bounded, free = states(history, max_relative_gain=multiple), states(history, max_relative_gain=None)
    for (n, _, _), tight, loose in zip(history, bounded, free, strict=True):
        model = algorithm.model_gain(*algorithm.debiased(tight.averages, tight.weight), tight.weight, scalar(n), 1.0)
        assert torch.equal(tight.gain, torch.minimum(loose.gain, (multiple * model).clamp(min=1)))


@given(histories())
def test_progress_is_the_sum_of_the_gains_of_updates_with_a_gradient(history):
    total = torch.zeros(3, dtype=torch.float64)
    for (_, a, _), state in zip(history, states(history), strict=True):
        total += torch.where(vector(*a) > 0, state.gain, 0)
        torch.testing.assert_close(state.progress, total)


# -- micro-gradients, through the optimizer ---------------------------------------------------------------------------


@given(SEEDS, st.integers(2, 8), st.floats(1e-3, 1e3))
def test_a_loss_multiplied_by_a_number_leaves_the_gains_as_they_are(seed, n, scale):
    gradients = random_gradients(weights(5, 3), n, seed)
    scaled = [[scale * g for g in each] for each in gradients]
    assert gains_of(weights(5, 3), scaled) == pytest.approx(gains_of(weights(5, 3), gradients), rel=1e-9)


@given(SEEDS, st.integers(2, 8), st.randoms(use_true_random=False))
def test_the_order_of_micro_batches_does_not_matter(seed, n, random):
    gradients = random_gradients(weights(5, 3), n, seed)
    shuffled = random.sample(gradients, k=n)
    assert gains_of(weights(5, 3), shuffled) == pytest.approx(gains_of(weights(5, 3), gradients), rel=1e-9)


@given(SEEDS, st.integers(1, 8))
def test_equal_micro_gradients_have_gain_one(seed, n):
    (gradients,) = random_gradients(weights(5, 3), 1, seed)
    assert gains_of(weights(5, 3), [gradients] * n) == pytest.approx([1, 1], abs=1e-12)


@given(SEEDS, st.integers(1, 8), st.floats(1e-3, 1e3))
def test_orthogonal_micro_gradients_of_equal_norm_have_gain_n(seed, n, length):
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))
    gradients = [[length * row] for row in rotation[:n]]
    assert gains_of(weights(8), gradients) == pytest.approx([n], rel=1e-6)


# -- the base rule ----------------------------------------------------------------------------------------------------

ADAMW = st.fixed_dictionaries(
    {
        "lr": st.floats(1e-5, 1.0),
        "betas": st.tuples(st.floats(0, 0.99), st.floats(0, 0.999)),
        "eps": st.floats(1e-10, 1e-3),
        "weight_decay": st.floats(0, 0.5),
    }
)


def adamw_on(parameters, updates, keys):
    """torch's AdamW on the averages of the micro-gradients."""
    optimizer = torch.optim.AdamW(parameters, **keys)
    for micro_gradients in updates:
        for parameter, of_one in zip(parameters, zip(*micro_gradients, strict=True), strict=True):
            parameter.grad = torch.stack(of_one).mean(0)
        optimizer.step()


def assert_same(parameters, others):
    for one, other in zip(parameters, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@given(SEEDS, ADAMW, st.integers(1, 5))
def test_one_micro_gradient_and_no_warm_up_is_adamw(seed, keys, updates):
    lena, adamw = weights(5, 3), weights(5, 3)
    history = [random_gradients(lena, 1, seed + t) for t in range(updates)]
    optimizer = LENA(lena, warmup="none", **keys)
    for gradients in history:
        train_window(optimizer, lena, gradients)
    adamw_on(adamw, history, keys)
    assert_same(lena, adamw)


@given(SEEDS, ADAMW, st.integers(2, 5))
def test_an_excluded_parameter_follows_adamw_whatever_the_others_do(seed, keys, n):
    lena, adamw = weights(5, 3), weights(5, 3)
    history = [random_gradients(lena, n, seed + t) for t in range(3)]
    optimizer = LENA([{"params": lena[:1]}, {"params": lena[1:], "lena": False}], total_steps=10, **keys)
    for gradients in history:
        train_window(optimizer, lena, gradients)
    adamw_on(adamw, history, keys)
    assert_same(lena[1:], adamw[1:])
    assert not torch.equal(lena[0], adamw[0])


@given(SEEDS, ADAMW, st.integers(2, 5))
def test_scaling_none_without_warm_up_is_adamw_and_still_measures(seed, keys, n):
    lena, adamw = weights(5, 3), weights(5, 3)
    history = [random_gradients(lena, n, seed + t) for t in range(3)]
    optimizer = LENA(lena, scaling="none", warmup="none", **keys)
    for gradients in history:
        train_window(optimizer, lena, gradients)
    adamw_on(adamw, history, keys)
    assert_same(lena, adamw)
    assert ds_lena.report(optimizer)["layers"]["param_0"]["noise"] > 0
