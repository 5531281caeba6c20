"""The gain, formula by formula, on micro-gradients that can be checked by hand. The warm-up is in test_warmup.py."""

import pytest
import torch
from pytest import approx

from ds_lena.grad_stats.measurement import Measurement
from ds_lena.schedule import algorithm
from ds_lena.schedule.algorithm import Clock, LayerState
from tests.unit.support import config, measure, scalar, statistics, vector

FAR = Clock(done=scalar(1.0), planned=scalar(1e9))
ALONE = {"warmup": "none", "max_relative_gain": None}

# Two micro-gradients (3, 0) and (1, 0): A = 5, B = 4, so s2 = 2 (5 - 4) = 2, m2 = 4 - 2/2 = 3, r = (2 + 3) / (1 + 3).
WORKED = [[3, 0], [1, 0]]


def orthogonal(n, length=1.0):
    return (length * torch.eye(n)).tolist()


def update(state, measured, k=1.0, sizes=None, clock=FAR, **keys):
    sizes = vector(*(sizes or [1] * len(measured.mean_square)))
    return algorithm.advance(state, measured, clock, k, sizes, config(**(ALONE | keys)))


def first_update(measured, k=1.0, **keys):
    return update(LayerState.start(len(measured.mean_square), warmup=1.0), measured, k, **keys)


def estimates(state):
    return algorithm.debiased(state.averages, state.weight)


@pytest.mark.parametrize(("n", "k"), [(2, 1), (8, 1), (8, 2), (8, 3), (8, 0.5)])
def test_orthogonal_micro_gradients_of_equal_norm_have_the_largest_gain(n, k):
    assert first_update(measure(orthogonal(n)), k).gain.item() == approx(n / k, rel=1e-6)


@pytest.mark.parametrize("k", [1, 2])
def test_equal_micro_gradients_have_gain_one(k):
    state = first_update(measure([[3, 4]] * 4), k)
    assert state.gain.item() == 1
    assert estimates(state).flatten().tolist() == [0, 25]


def test_opposite_micro_gradients_have_a_negative_signal_and_the_largest_gain():
    state = first_update(measure([[1, 2], [-1, -2]]))
    assert estimates(state).flatten().tolist() == [10, -5]
    assert state.gain.item() == approx(2, rel=1e-7)


def test_the_worked_example():
    state = first_update(measure(WORKED))
    assert estimates(state).flatten().tolist() == [2, 3]
    assert state.gain.item() == approx(5 / 4, rel=1e-7)


def test_a_base_batch_of_two_micro_batches_halves_the_noise_of_a_base_step():
    # A = 7, B = 4, n = 4: s2 = 4/3 x 3 = 4, m2 = 3, r = (4/2 + 3) / (4/4 + 3)
    assert first_update(statistics(4, [7], [4]), k=2).gain.item() == approx(5 / 4, rel=1e-7)


def test_the_gain_is_one_where_the_base_batch_is_not_smaller_than_the_update():
    assert first_update(measure(orthogonal(4)), k=8).gain.item() == 1


def test_noise_and_signal_give_back_both_statistics():
    a, b, n = vector(7, 5), vector(4, 0), scalar(4)
    noise, signal = algorithm.noise_and_signal(a, b, n)
    torch.testing.assert_close(noise + signal, a)
    torch.testing.assert_close(noise / n + signal, b)


def test_scaling_every_gradient_leaves_the_gain_as_it_is():
    assert first_update(statistics(8, [7e-30], [4e-30])).gain == approx(first_update(statistics(8, [7], [4])).gain)


# -- moving averages --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "weight"), [(2, 0.002), (64, 0.064), (1000, 1.0), (4000, 1.0)])
def test_without_smoothing_a_new_value_has_the_weight_of_the_paper(n, weight):
    assert algorithm.new_value_weight(scalar(n), None) == approx(weight)


def test_a_smoothing_is_the_weight_of_the_old_average():
    assert algorithm.new_value_weight(scalar(8), 0.9) == approx(0.1)


@pytest.mark.parametrize("smoothing", [None, 0.0, 0.5, 0.99])
def test_the_first_average_is_the_first_value(smoothing):
    assert estimates(first_update(measure(WORKED), smoothing=smoothing)).flatten().tolist() == approx([2, 3])


def test_later_averages_weigh_noise_and_signal_and_are_debiased():
    state = first_update(measure(WORKED), smoothing=0.75)  # noise 2, signal 3
    state = update(state, measure([[1, 2], [-1, -2]]), smoothing=0.75)  # noise 10, signal -5
    assert state.weight.item() == approx(0.75 * 0.25 + 0.25)
    assert state.averages.flatten().tolist() == approx([0.1875 * 2 + 0.25 * 10, 0.1875 * 3 - 0.25 * 5])
    assert estimates(state).flatten().tolist() == approx([2.875 / 0.4375, -0.6875 / 0.4375])


def test_only_the_averaged_signal_is_floored_not_each_value():
    state = first_update(measure([[3, 4]] * 2), smoothing=0.5)  # noise 0, signal 25
    state = update(state, measure([[1, 2], [-1, -2]]), smoothing=0.5)  # noise 10, signal -5
    noise, signal = 10 * 2 / 3, (25 - 5 * 2) / 3
    assert state.gain.item() == approx((noise + signal) / (noise / 2 + signal))


def test_at_a_fixed_n_the_gain_is_the_ratio_of_the_averages_of_a_and_b():
    generator = torch.Generator().manual_seed(0)
    state, a_average, b_average = LayerState.start(3, warmup=1.0), 0.0, 0.0
    for _ in range(20):
        gradients = 1 + torch.randn(3, 16, 10, generator=generator, dtype=torch.float64)
        a, b = gradients.square().sum(2).mean(1), gradients.mean(1).square().sum(1)
        a_average, b_average = 0.9 * a_average + 0.1 * a, 0.9 * b_average + 0.1 * b
        state = update(state, Measurement(scalar(16), a, b), smoothing=0.9)
    torch.testing.assert_close(state.gain, a_average / b_average, rtol=1e-6, atol=0)


def test_estimates_stay_unbiased_when_n_changes_from_update_to_update():
    layers, noise, signal = 20_000, 4.0, 0.25
    generator = torch.Generator().manual_seed(0)
    state = LayerState.start(layers, warmup=1.0)
    for n in (2, 32, 3, 8, 2, 16):
        gradients = signal**0.5 + noise**0.5 * torch.randn(n, layers, generator=generator, dtype=torch.float64)
        measured = Measurement(scalar(n), gradients.square().mean(0), gradients.mean(0).square())
        state = update(state, measured, smoothing=0.8)
    for found, truth in zip(estimates(state), (noise, signal), strict=True):
        standard_error = found.std() / layers**0.5
        assert standard_error < 0.1 * truth
        assert abs(found.mean() - truth) < 4 * standard_error


def test_another_micro_batch_size_rescales_the_noise_alone():
    state = algorithm.rescale_noise(first_update(measure(WORKED)), 0.5)
    assert estimates(state).flatten().tolist() == approx([1, 3])


# -- the floor e, and the bound by the model's gain -------------------------------------------------------------------


def test_the_floor_is_a_share_of_the_mean_square_gradient_of_the_whole_model():
    # Layers of 1 and 3 elements with s2 = 2 and 4, m2 = 0 and 2: e = 1e-8 x (1, 3) x 8 / 4.
    state = first_update(statistics(4, [2, 6], [0.5, 3]), sizes=[1, 3])
    floors = vector(2e-8, 6e-8)
    noise, signal = vector(2, 4), vector(0, 2)
    expected = (noise + signal + floors) / (noise / 4 + signal + floors)
    torch.testing.assert_close(state.gain, expected, rtol=1e-14, atol=0)
    assert state.gain[0] < 4


def test_a_layer_that_shows_rounding_noise_alone_has_gain_one():
    state = first_update(statistics(8, [5, 1e-20], [4, 1e-20 / 8]))
    assert state.gain[1].item() == approx(1)


def test_a_layer_of_gradients_a_thousand_times_smaller_than_the_model_s_keeps_its_gain():
    state = first_update(statistics(8, [5, 5e-6], [4, 4e-6]))
    assert state.gain[1].item() == approx(state.gain[0].item(), rel=1e-2)


def test_layers_without_averages_take_no_part_in_the_floor():
    alone = first_update(statistics(4, [2], [0.5]), sizes=[3])
    beside = first_update(statistics(4, [2, 0], [0.5, 0]), sizes=[3, 1000])
    assert beside.gain[0].item() == alone.gain.item()


def test_no_layer_has_more_than_a_multiple_of_the_gain_of_the_model():
    # Noise alone (A = 8, B = 1, gain 8) beside a strong signal (A = B = 24). The model: s2 = 8, m2 = 24, gain 32 / 25.
    odd = statistics(8, [8, 24], [1, 24])
    assert first_update(odd, max_relative_gain=2).gain.tolist() == approx([64 / 25, 1])
    assert first_update(odd, max_relative_gain=1).gain.tolist() == approx([32 / 25, 1])
    assert first_update(odd, max_relative_gain=None).gain.tolist() == approx([8, 1], rel=1e-6)


def test_the_model_s_gain_floors_the_sum_of_the_signals_not_each_of_them():
    # m2 = -1 and 3, s2 = 8 and 0: together s2 = 8, m2 = 2, gain (8 + 2) / (1 + 2).
    noise, signal, known = vector(8, 0), vector(-1, 3), vector(1, 1)
    assert algorithm.model_gain(noise, signal, known, scalar(8), 1.0).item() == approx(10 / 3)


def test_the_model_s_gain_is_at_most_r():
    assert algorithm.model_gain(vector(8), vector(-5), vector(1), scalar(8), 2.0).item() == 4


# -- layers without a value -------------------------------------------------------------------------------------------


def test_one_micro_gradient_gives_gain_one_and_no_new_average():
    before = first_update(measure(orthogonal(4)))
    after = update(before, statistics(1, [9], [9]))
    assert after.gain.item() == 1
    assert torch.equal(after.averages, before.averages)
    assert torch.equal(after.weight, before.weight)
    assert after.progress.item() == before.progress.item() + 1


def test_one_micro_gradient_has_gain_one_even_where_it_holds_several_base_batches():
    before = first_update(measure(orthogonal(4)), k=0.5)
    assert update(before, statistics(1, [9], [9]), k=0.5).gain.item() == 1


def test_averages_measured_before_an_update_of_one_micro_gradient_serve_again_after_it():
    before = first_update(measure(WORKED), smoothing=0.5)
    after = update(update(before, statistics(1, [9], [9]), smoothing=0.5), measure(WORKED), smoothing=0.5)
    assert after.gain.item() == approx(5 / 4, rel=1e-7)


def test_a_layer_without_gradient_has_gain_one_at_first():
    state = first_update(statistics(4, [0, 5], [0, 4]))
    assert state.gain[0].item() == 1
    assert state.progress[0].item() == 0


def test_a_layer_without_gradient_keeps_averages_and_progress_but_its_gain_follows_n():
    before = first_update(statistics(4, [7], [4]))  # s2 = 4, m2 = 3
    after = update(before, statistics(8, [0], [0]))
    assert torch.equal(after.averages, before.averages)
    assert torch.equal(after.weight, before.weight)
    assert torch.equal(after.progress, before.progress)
    assert after.gain.item() == approx((4 + 3) / (4 / 8 + 3), rel=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["A", "B"])
def test_a_layer_with_a_non_finite_statistic_keeps_everything(bad, which):
    keys = {"warmup": "layer", "total_steps": 10}
    start = LayerState.start(2, warmup=0.0)
    before = update(start, statistics(4, [7, 7], [4, 4]), **keys)
    spoilt = statistics(4, [9, bad], [2, 2]) if which == "A" else statistics(4, [9, 9], [2, bad])
    after = update(before, spoilt, clock=Clock(done=scalar(1e8), planned=scalar(1e9)), **keys)
    for name in ("averages", "weight", "progress", "gain", "warmup", "capped"):
        assert torch.equal(getattr(after, name)[..., 1], getattr(before, name)[..., 1]), name
    assert after.progress[0] > before.progress[0]
    assert after.gain[0] > before.gain[0]
    assert after.warmup[0] > before.warmup[0]


# -- what the learning rate is multiplied by --------------------------------------------------------------------------


@pytest.mark.parametrize(("scaling", "gain"), [("linear", 8), ("sqrt", 8**0.5), ("none", 1)])
def test_a_fixed_scaling_depends_on_the_number_of_micro_gradients_alone(scaling, gain):
    state = first_update(measure([[3, 4]] * 16), k=2, scaling=scaling)
    assert state.gain.item() == approx(gain)
    assert estimates(state).flatten().tolist() == [0, 25], "it measures all the same"


def test_the_gain_power_applies_to_the_gain_and_not_to_fixed_scalings():
    measured = measure(orthogonal(4))
    powered = config(**ALONE, gain_power=0.5)
    assert algorithm.step_factor(first_update(measured), powered).item() == approx(2, rel=1e-6)
    linear = config(**ALONE, gain_power=0.5, scaling="linear")
    assert algorithm.step_factor(first_update(measured, scaling="linear"), linear).item() == 4


@pytest.mark.parametrize(("limit", "factor"), [(None, 3.0), (100, 3.0), (2, 2.0), (1, 1.0)])
def test_max_factor_bounds_the_powered_gain(limit, factor):
    state = first_update(statistics(9, [9], [1]))
    assert algorithm.step_factor(state, config(**ALONE, gain_power=0.5, max_factor=limit)).item() == approx(factor)


def test_the_warm_up_multiplies_after_max_factor():
    state = LayerState.start(1, warmup=0.25)
    state.gain.fill_(8)
    assert algorithm.step_factor(state, config(max_factor=4)).item() == 1
