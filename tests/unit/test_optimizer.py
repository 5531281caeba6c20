"""LENA in plain PyTorch, one process: what a window is, what it measures, and how its parameters move."""

import math

import pytest
import torch
from pytest import approx
from torch import nn
from torch.autograd import Variable

import ds_lena
from ds_lena import LENA, ConfigError, StateError, UnsupportedError
from ds_lena.keys import BASES
from ds_lena.optimizer import controller_of
from tests.unit.support import backward, random_gradients, train_window, vector, weights

NO_WARMUP = {"warmup": "none", "max_relative_gain": None}
SGD = {"base": "sgd", "momentum": 0, "lr": 0.1}

# Two micro-gradients (3, 0) and (1, 0): s2 = 2, m2 = 3, gain 5/4. Their mean is (2, 0).
WORKED = [[vector(3, 0)], [vector(1, 0)]]


def one_weight():
    return weights(2)


def layer(optimizer, name="param_0"):
    return ds_lena.report(optimizer)["layers"][name]


def moved_by(parameters, action):
    before = [p.detach().clone() for p in parameters]
    action()
    return [p.detach() - old for p, old in zip(parameters, before, strict=True)]


# -- one update -------------------------------------------------------------------------------------------------------


def test_the_worked_example_through_the_optimizer():
    parameters = one_weight()
    optimizer = LENA(parameters, **SGD, **NO_WARMUP)
    (step,) = moved_by(parameters, lambda: train_window(optimizer, parameters, WORKED))
    assert (layer(optimizer)["noise"], layer(optimizer)["signal"]) == approx((2, 3))
    torch.testing.assert_close(step, -0.1 * 5 / 4 * vector(2, 0), rtol=1e-7, atol=1e-15)


def test_micro_gradients_do_not_depend_on_how_the_loss_is_divided():
    divided, summed = one_weight(), one_weight()
    first, second = (LENA(p, **SGD, **NO_WARMUP) for p in (divided, summed))
    train_window(first, divided, WORKED)
    for gradients in WORKED:
        backward(summed, gradients)
    second.step()
    assert layer(second)["gain"] == approx(layer(first)["gain"])
    assert layer(second)["noise"] == approx(4 * layer(first)["noise"]), "in units of the squared gradient"


def test_micro_batches_may_have_different_weights_in_the_average():
    parameters = one_weight()
    optimizer = LENA(parameters, **NO_WARMUP)
    for share in (0.75, 0.25):
        backward(parameters, [share * vector(1, 0)])
    optimizer.step()
    # g_i = n x its share: (1.5, 0) and (0.5, 0), A = 1.25, B = 1.
    assert (layer(optimizer)["noise"], layer(optimizer)["signal"]) == approx((0.5, 0.75))


def test_n_is_counted_in_every_window():
    parameters = one_weight()
    optimizer = LENA(parameters, **NO_WARMUP)
    for n in (4, 1, 3):
        train_window(optimizer, parameters, random_gradients(parameters, n, seed=n))
        assert ds_lena.report(optimizer)["n"] == n


def test_the_learning_rate_of_a_scheduler_is_multiplied_and_left_as_it_is():
    parameters = one_weight()
    optimizer = LENA(parameters, **SGD, **NO_WARMUP)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    train_window(optimizer, parameters, WORKED)
    scheduler.step()
    (step,) = moved_by(parameters, lambda: train_window(optimizer, parameters, WORKED))
    torch.testing.assert_close(step, -0.05 * 5 / 4 * vector(2, 0), rtol=1e-7, atol=1e-15)
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_the_learning_rate_may_be_a_tensor():
    plain, tensor = one_weight(), one_weight()
    for parameters, lr in ((plain, 0.5), (tensor, torch.tensor(0.5, dtype=torch.float64))):
        optimizer = LENA([{"params": parameters, "lr": lr}], **NO_WARMUP)
        train_window(optimizer, parameters, WORKED)
    torch.testing.assert_close(tensor[0], plain[0], rtol=1e-12, atol=0)


def test_weight_decay_has_the_factor_of_its_layer():
    parameters = one_weight()
    start = parameters[0].detach().clone()
    optimizer = LENA(parameters, lr=0.1, weight_decay=0.5, **NO_WARMUP)
    train_window(optimizer, parameters, [[vector(3, 0)], [vector(1, 0)]])
    # The second element has no gradient: decay alone moves it.
    assert parameters[0][1].item() == approx((start[1] * (1 - 0.1 * (5 / 4) ** 0.85 * 0.5)).item(), rel=1e-7)


def test_a_parameter_without_gradient_is_left_alone_as_torch_does():
    parameters = weights(2, 2)
    optimizer = LENA(parameters, weight_decay=0.5, **NO_WARMUP)
    used, unused = moved_by(parameters, lambda: train_window(optimizer, parameters, [[vector(1, 1), None]]))
    assert used.abs().sum() > 0
    assert unused.abs().sum() == 0
    assert len(optimizer.state[parameters[1]]) == 0


def test_a_bfloat16_model_moves():
    parameters = weights(100, dtype=torch.bfloat16)
    optimizer = LENA(parameters, lr=0.1, **NO_WARMUP)
    (step,) = moved_by(parameters, lambda: train_window(optimizer, parameters, random_gradients(parameters, 4, seed=0)))
    # AdamW's first step is the learning rate, times the factor.
    factor = layer(optimizer)["factor"]
    torch.testing.assert_close(step.abs().float(), torch.full((100,), 0.1 * factor), rtol=0.1, atol=0.01)


def test_a_closure_is_the_window():
    parameters = one_weight()
    optimizer = LENA(parameters, **NO_WARMUP)

    def closure():
        optimizer.zero_grad()
        assert torch.is_grad_enabled()
        for gradients in WORKED:
            backward(parameters, gradients)
        return 42.0

    assert optimizer.step(closure) == 42
    assert layer(optimizer)["gain"] == approx(5 / 4)


# -- the window -------------------------------------------------------------------------------------------------------


def throw_away_by_optimizer(optimizer, parameters):
    optimizer.zero_grad()


def throw_away_and_keep_zeros(optimizer, parameters):
    optimizer.zero_grad(set_to_none=False)


def throw_away_by_model(optimizer, parameters):
    for parameter in parameters:
        parameter.grad = None


@pytest.mark.parametrize("throw_away", [throw_away_by_optimizer, throw_away_and_keep_zeros, throw_away_by_model])
def test_gradients_that_are_thrown_away_leave_nothing_in_the_window(throw_away):
    parameters = one_weight()
    optimizer = LENA(parameters, **NO_WARMUP)
    backward(parameters, [vector(100, 100)])
    throw_away(optimizer, parameters)
    for gradients in WORKED:
        backward(parameters, [gradients[0] / 2])
    optimizer.step()
    assert ds_lena.report(optimizer)["n"] == 2
    assert layer(optimizer)["gain"] == approx(5 / 4)


def test_a_thrown_away_window_is_noticed_by_a_pass_that_reaches_other_parameters():
    heads = weights(2, 2)
    optimizer = LENA(heads, **NO_WARMUP)
    backward(heads, [vector(100, 100), None])
    throw_away_by_model(optimizer, heads)
    for gradients in WORKED:
        backward(heads, [None, gradients[0] / 2])
    optimizer.step()
    assert ds_lena.report(optimizer)["n"] == 2
    assert layer(optimizer, "param_1")["gain"] == approx(5 / 4)


def test_a_window_may_grow_over_parameters_that_no_pass_reached_before():
    heads = weights(2, 2)
    optimizer = LENA(heads, **NO_WARMUP)
    backward(heads, [vector(1, 0), None])
    backward(heads, [None, vector(1, 0)])
    optimizer.step()
    assert ds_lena.report(optimizer)["n"] == 2


def test_clipping_by_the_user_moves_less_and_is_not_measured():
    parameters, free = one_weight(), one_weight()
    for each, clip in ((parameters, True), (free, False)):
        optimizer = LENA(each, **SGD, **NO_WARMUP)
        for gradients in WORKED:
            backward(each, [gradients[0] / 2])
        if clip:
            nn.utils.clip_grad_norm_(each, 0.2)
        (step,) = moved_by(each, optimizer.step)
        assert (layer(optimizer)["noise"], layer(optimizer)["signal"]) == approx((2, 3))
        assert step.norm().item() == approx(0.1 * 5 / 4 * (0.2 if clip else 2), rel=1e-5)


def test_a_gradient_that_is_changed_between_the_passes_of_the_first_update_is_refused():
    parameters = one_weight()
    optimizer = LENA(parameters, **NO_WARMUP)
    backward(parameters, [vector(1, 0)])
    parameters[0].grad.mul_(0.5)
    with pytest.raises(UnsupportedError, match=r'"param_0" was changed between two backward passes.*register_hook'):
        backward(parameters, [vector(1, 0)])
    assert controller_of(optimizer).schedule.updates == 0


def test_a_hook_that_may_change_the_sum_is_refused():
    parameters = one_weight()
    optimizer = LENA(parameters, **NO_WARMUP)

    def halve(parameter):
        parameter.grad.mul_(0.5)

    parameters[0].register_post_accumulate_grad_hook(halve)
    with pytest.raises(UnsupportedError, match=r'"param_0" has a hook by .*halve.*Use register_hook'):
        backward(parameters, [vector(1, 0)])
    assert controller_of(optimizer).schedule.updates == 0


def test_a_part_of_the_gradients_that_is_thrown_away_leaves_the_others():
    parameters = weights(2, 2)
    optimizer = LENA(parameters, **NO_WARMUP)
    micro = [vector(1, 0), vector(0, 3)]
    backward(parameters, [micro[0], micro[0]])
    parameters[0].grad = None
    backward(parameters, [micro[1], micro[1]])
    optimizer.step()
    report = ds_lena.report(optimizer)
    assert report["n"] == 2
    assert report["layers"]["param_1"]["noise"] == approx(2 * (2 * (1 + 9) - 10))


def test_gradients_of_the_update_before_that_are_still_there_are_told_once(caplog):
    parameters = one_weight()
    optimizer = LENA(parameters, **NO_WARMUP)
    for _ in range(3):
        backward(parameters, [vector(1, 0)])
        optimizer.step()
    assert caplog.text.count("the gradients of the update before are still there") == 1


def test_a_model_that_becomes_half_after_construction_is_refused():
    model = nn.Linear(2, 2)
    optimizer = LENA(model.named_parameters(), **NO_WARMUP)
    model.half()
    with pytest.raises(UnsupportedError, match="float16"):
        model(torch.ones(1, 2, dtype=torch.float16)).sum().backward()
    assert controller_of(optimizer).schedule.updates == 0


def test_a_step_without_any_gradient_does_nothing():
    optimizer = LENA(one_weight())
    optimizer.step()
    assert controller_of(optimizer).schedule.updates == 0


def test_gradients_that_were_filled_in_by_hand_are_an_error():
    parameters = one_weight()
    optimizer = LENA(parameters, **NO_WARMUP)
    parameters[0].grad = vector(1, 2)
    with pytest.raises(StateError, match="no backward pass was seen"):
        optimizer.step()


def test_a_second_step_on_the_same_gradients_is_an_error():
    parameters = one_weight()
    optimizer = LENA(parameters, **NO_WARMUP)
    train_window(optimizer, parameters, WORKED)
    with pytest.raises(StateError, match="no backward pass was seen"):
        optimizer.step()


# -- what has to be known ---------------------------------------------------------------------------------------------


def test_a_warm_up_needs_the_length_of_the_run_at_the_first_step():
    parameters = one_weight()
    optimizer = LENA(parameters)
    with pytest.raises(ConfigError, match=r'"total_steps" is not known.*Give "total_steps".*"warmup": "none"'):
        train_window(optimizer, parameters, WORKED)


def test_without_a_warm_up_the_length_of_the_run_is_not_needed():
    parameters = one_weight()
    optimizer = LENA(parameters, warmup="none")
    train_window(optimizer, parameters, WORKED)
    assert layer(optimizer)["warmup"] == 1


def test_a_base_batch_needs_the_size_of_a_micro_batch_at_the_first_step():
    parameters = one_weight()
    optimizer = LENA(parameters, base_batch_size=16, **NO_WARMUP)
    with pytest.raises(ConfigError, match=r'"base_batch_size": 16.*Give "micro_batch_size"'):
        train_window(optimizer, parameters, WORKED)


def test_a_base_batch_in_samples():
    parameters = one_weight()
    optimizer = LENA(parameters, base_batch_size=16, micro_batch_size=8, **NO_WARMUP)
    train_window(optimizer, parameters, 2 * WORKED)
    assert ds_lena.report(optimizer)["base"] == 2


def test_a_report_before_the_first_update():
    report = ds_lena.report(LENA(weights(2, 3), total_steps=10))
    assert (report["update"], report["n"], report["gain"]) == (0, 0, 1)
    assert {name: entry["gain"] for name, entry in report["layers"].items()} == {"param_0": 1, "param_1": 1}
    assert report["noise_scale"] == math.inf


def test_a_gradient_that_is_not_finite_is_counted_and_its_layer_keeps_its_factor():
    parameters = weights(2, 2)
    optimizer = LENA(parameters, total_steps=10)
    train_window(optimizer, parameters, random_gradients(parameters, 4, seed=0))
    before = layer(optimizer)
    train_window(optimizer, parameters, [[vector(math.nan, 1), vector(1, 2)], [vector(1, 1), vector(2, 1)]])
    assert layer(optimizer) == before
    assert ds_lena.report(optimizer)["nonfinite"] == 1


def test_the_gradient_is_measured_after_a_reduction_in_a_callback_of_a_callback():
    """So DDP finishes with static_graph: in a callback at the end of backward, which queues another one."""
    parameters = weights(2)
    optimizer = LENA(parameters, warmup="none")
    finish = Variable._execution_engine.queue_callback

    def reduce(parameter):
        finish(lambda: finish(lambda: parameter.grad.mul_(0.5)))

    reduce.__module__ = "torch.nn.parallel.distributed"
    parameters[0].register_post_accumulate_grad_hook(reduce)
    backward(parameters, [vector(6, 8)])
    assert controller_of(optimizer).meter.squares_of_mean.tolist() == [25]


# -- memory formats and interruptions ---------------------------------------------------------------------------------


def conv_weight(channels_last=False):
    weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    return torch.nn.Parameter(weight.to(memory_format=torch.channels_last) if channels_last else weight)


def conv_step(optimizer, weight, seed, contiguous_gradient=False):
    gradient = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    backward([weight], [gradient])
    if contiguous_gradient:
        weight.grad = weight.grad.contiguous()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("case", ["model changed", "state changed", "gradient differs"])
def test_it_does_not_matter_how_a_tensor_lies_in_memory(base, case):
    """torch's fused kernels on the CPU go through memory as it comes, whatever the strides are."""
    keys = {"base": base, "warmup": "none", "lr": 0.01}
    straight, turned = conv_weight(), conv_weight(channels_last=case == "gradient differs")
    optimizers = [LENA([weight], **keys) for weight in (straight, turned)]
    for seed in range(4):
        conv_step(optimizers[0], straight, seed)
        if seed == 2 and case == "model changed":
            turned.data = turned.data.to(memory_format=torch.channels_last)
        if seed == 2 and case == "state changed":
            state = optimizers[1].state[turned]
            for name in [name for name in state if name != "step"]:
                state[name] = state[name].to(memory_format=torch.channels_last)
        conv_step(optimizers[1], turned, seed, contiguous_gradient=case == "gradient differs")
    torch.testing.assert_close(turned.detach(), straight.detach(), rtol=1e-5, atol=1e-7)


def test_the_rates_of_an_interrupted_update_are_forgotten():
    parameters = weights(3)
    optimizer = LENA(parameters, lr=0.1, warmup="none", max_relative_gain=None, smoothing=0.0, base="sgd", momentum=0)
    noisy, calm = [[vector(3, 0, 0)], [vector(-1, 0, 0)]], [[vector(1, 0, 0)], [vector(1, 0, 0)]]
    applier = controller_of(optimizer)._applier
    moving = applier._moving
    applier._moving = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        train_window(optimizer, parameters, noisy)
    applier._moving = moving
    (step,) = moved_by(parameters, lambda: train_window(optimizer, parameters, calm))
    assert step.abs().max().item() == pytest.approx(0.1)
