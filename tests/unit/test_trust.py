"""Trust ratios in the optimizer: what has one, what it is when it cannot be, and that measuring it leaves no trace."""

from dataclasses import replace

import pytest
import torch
from pytest import approx
from torch import nn

from ds_lena import LENA, ConfigError
from ds_lena.optimizer import controller_of
from tests.unit.support import backward

RULES = {"lamb": {"betas": (0.8, 0.95), "eps": 1e-6}, "lars": {"momentum": 0.9, "trust_coefficient": 0.1}}
PLAIN = {"scaling": "none", "warmup": "none", "lr": 0.5}
BASES = pytest.mark.parametrize("base", RULES)


def optimizer_of(parameters, base, **keys):
    return LENA(parameters, base=base, **(RULES[base] | PLAIN | keys))


def tensor(*shape, seed=0, dtype=torch.float64):
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return nn.Parameter(numbers.to(dtype))


def gradient(parameter, seed=7):
    return torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step(optimizer, *gradients):
    """One update; how far each parameter moved."""
    parameters = controller_of(optimizer).parameters
    before = [parameter.detach().clone() for parameter in parameters]
    backward(parameters, gradients)
    optimizer.step()
    optimizer.zero_grad()
    return [then - parameter.detach() for parameter, then in zip(parameters, before, strict=True)]


def without_ratio(parameter, base, *gradients, **keys):
    """How far one update of the rule moves a tensor with the ratio 1: it is flattened to one dimension."""
    flat = nn.Parameter(parameter.detach().clone().view(-1))
    optimizer = optimizer_of([flat], base, **keys)
    moved = [step(optimizer, g.view(-1))[0].view(parameter.shape) for g in gradients]
    return moved[-1]


# -- what the ratio is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lamb_moves_a_matrix_by_its_own_norm(weight_decay):
    weight = tensor(6, 4)
    norm = weight.norm().item()
    (moved,) = step(optimizer_of([weight], "lamb", weight_decay=weight_decay), gradient(weight))
    assert moved.norm().item() == approx(0.5 * norm)


def test_lars_moves_a_matrix_by_its_own_norm():
    weight = tensor(6, 4)
    norm = weight.norm().item()
    (moved,) = step(optimizer_of([weight], "lars", weight_decay=0.0), gradient(weight))
    assert moved.norm().item() == approx(0.5 * 0.1 * norm)


@pytest.mark.parametrize(("base", "default"), [("lamb", 1.0), ("lars", 1e-3)])
def test_the_coefficient_multiplies_the_ratio_and_has_the_published_default(base, default):
    given, left_out = (
        step(optimizer_of([weight], base, trust_coefficient=coefficient), gradient(weight))[0]
        for weight, coefficient in ((tensor(6, 4), 2.0), (tensor(6, 4), None))
    )
    torch.testing.assert_close(given, left_out * 2.0 / default)


@BASES
def test_the_ratio_is_kept_within_trust_clip(base):
    weight = tensor(6, 4)
    plain = without_ratio(weight, base, gradient(weight))
    (moved,) = step(optimizer_of([weight], base, trust_clip=[7.0, 7.5]), gradient(weight))
    torch.testing.assert_close(moved, plain * 7.0)


@BASES
def test_ratios_are_per_tensor_whatever_the_layer_is(base):
    def moved(**keys):
        weights = [tensor(6, 4), tensor(3, 5, seed=1)]
        return step(optimizer_of(weights, base, **keys), *map(gradient, weights))

    for one, other in zip(moved(layer="tensor"), moved(layer="model"), strict=True):
        torch.testing.assert_close(one, other)


@BASES
def test_the_gain_of_the_layer_multiplies_it(base):
    def moved(**keys):
        weight = tensor(6, 4)
        optimizer = optimizer_of([weight], base, weight_decay=0.0, max_relative_gain=None, **keys)
        start = weight.detach().clone()
        for sign in (1, -1):
            backward([weight], [gradient(weight) + sign * gradient(weight, seed=8)])
        optimizer.step()
        return start - weight.detach(), optimizer

    plain, _ = moved()
    scaled, optimizer = moved(scaling="gain", gain_power=1.0)
    gain = controller_of(optimizer).schedule.state.gain.item()
    assert 1 < gain <= 2
    torch.testing.assert_close(scaled, plain * gain)


@BASES
def test_excluded_parameters_and_groups_without_lena_have_a_ratio_too(base):
    inside, outside = tensor(6, 4), tensor(6, 4)
    optimizer = optimizer_of([{"params": [inside]}, {"params": [outside], "lena": False}], base)
    first, second = step(optimizer, gradient(inside), gradient(outside))
    torch.testing.assert_close(first, second)


# -- where there is none ----------------------------------------------------------------------------------------------


@BASES
@pytest.mark.parametrize("shape", [(5,), (1,), ()], ids=str)
def test_a_tensor_of_fewer_than_two_dimensions_has_the_ratio_1(base, shape):
    weight = tensor(*shape)
    scaled = nn.Parameter(weight.detach() * 3)
    moved, same = (step(optimizer_of([w], base, weight_decay=0.0), gradient(weight))[0] for w in (weight, scaled))
    torch.testing.assert_close(moved, same)


@BASES
def test_weights_of_zero_have_the_ratio_1(base):
    weight = nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
    plain = without_ratio(weight, base, gradient(weight))
    (moved,) = step(optimizer_of([weight], base), gradient(weight))
    torch.testing.assert_close(moved, plain)
    assert moved.norm() > 0


@BASES
def test_a_gradient_of_zero_has_the_ratio_1_and_moves_by_weight_decay_or_not_at_all(base):
    zero = torch.zeros(6, 4, dtype=torch.float64)
    (still,) = step(optimizer_of([tensor(6, 4)], base, weight_decay=0.0), zero)
    assert not still.any()
    weight = tensor(6, 4)
    start = weight.detach().clone()
    (moved,) = step(optimizer_of([weight], base, weight_decay=0.1), zero)
    # LAMB's update is then the weight itself, with a norm of its own; LARS looks at the gradient alone.
    ratio = 10.0 if base == "lamb" else 1.0
    torch.testing.assert_close(moved, 0.5 * ratio * 0.1 * start)


@BASES
def test_an_empty_tensor_and_a_frozen_one_are_no_obstacle(base):
    empty, frozen, weight = tensor(0, 4), tensor(6, 4), tensor(6, 4)
    frozen.requires_grad_(False)
    before = frozen.clone()
    optimizer = optimizer_of([empty, frozen, weight], base)
    step(optimizer, gradient(empty), gradient(weight))
    assert torch.equal(frozen, before)
    assert weight.isfinite().all()


@BASES
def test_a_parameter_without_gradient_is_left_alone(base):
    used, unused = tensor(6, 4), tensor(6, 4)
    _, moved = step(optimizer_of([used, unused], base), gradient(used), None)
    assert not moved.any()


# -- how it is measured -----------------------------------------------------------------------------------------------


@BASES
@pytest.mark.parametrize("size", [300, 70_001])
def test_bfloat16_without_master_weights_is_computed_in_float32(base, size):
    wide, narrow = tensor(size, 2), tensor(size, 2, dtype=torch.bfloat16)
    with torch.no_grad():
        wide.copy_(narrow)
    moves = [gradient(wide, seed).bfloat16().double() for seed in (7, 8)]
    for parameter in (wide, narrow):
        optimizer = optimizer_of([parameter], base, lr=0.05, weight_decay=0.1)
        for each in moves:
            step(optimizer, each)
    torch.testing.assert_close(narrow.double(), wide.detach(), rtol=2**-6, atol=1e-3)


@BASES
def test_weights_that_do_not_lie_in_a_row(base):
    rows = tensor(6, 4, 2, 2)
    columns = nn.Parameter(rows.detach().to(memory_format=torch.channels_last))
    assert not columns.is_contiguous()
    moved, same = (step(optimizer_of([w], base, weight_decay=0.1), gradient(rows))[0] for w in (rows, columns))
    torch.testing.assert_close(moved, same)


@BASES
def test_clipping_by_the_user_is_seen(base):
    weight = tensor(6, 4)
    optimizer = optimizer_of([weight], base, weight_decay=0.1)
    for size in (1.0, 5.0):
        backward([weight], [gradient(weight) * size])
        nn.utils.clip_grad_norm_([weight], 0.1)
        optimizer.step()
        optimizer.zero_grad()
    other = tensor(6, 4)
    optimizer = optimizer_of([other], base, weight_decay=0.1)
    for _ in range(2):
        step(optimizer, gradient(other) * 0.1 / gradient(other).norm())
    torch.testing.assert_close(weight.detach(), other.detach(), rtol=1e-5, atol=1e-7)


@BASES
def test_clipping_by_an_engine_is_foreseen(base):
    """An engine clips after the ratios are measured."""
    clipped, same = tensor(6, 4), tensor(6, 4)
    controller, other = (controller_of(optimizer_of([w], base, weight_decay=0.1)) for w in (clipped, same))
    controller.manage(replace(controller.binding, largest_norm=lambda: 0.1))
    measure, clips = controller._trust.measure, []
    controller._trust.measure = lambda clip, *rest: clips.append(clip.item()) or measure(clip, *rest)
    coefficient = 0.1 / (gradient(clipped).norm() + 1e-6)
    other.manage(other.binding)
    groups = [[{"params": [w], "lr": 0.5, "weight_decay": 0.1, **RULES[base]}] for w in (clipped, same)]
    for made, weight, its in ((controller, clipped, groups[0]), (other, same, groups[1])):
        state = {weight: {}}
        weight.grad = gradient(weight) * (1.0 if weight is clipped else coefficient)
        made.begin_update(its, state)
        if weight is clipped:
            weight.grad *= coefficient
        with torch.no_grad():
            made.apply(its, state)
        made.end_update(applied=True)
    assert clips == [approx(coefficient.item())]
    torch.testing.assert_close(clipped.detach(), same.detach())


@BASES
def test_an_update_that_is_thrown_away_leaves_no_trace(base):
    weights = [tensor(6, 4), tensor(6, 4)]
    optimizers = [optimizer_of([w], base, weight_decay=0.1) for w in weights]
    backward(weights[:1], [gradient(weights[0], seed=9)])
    thrown_away = controller_of(optimizers[0])
    thrown_away.begin_update(optimizers[0].param_groups, optimizers[0].state)
    thrown_away.end_update(applied=False)
    optimizers[0].zero_grad()
    moved, same = (step(o, gradient(w))[0] for o, w in zip(optimizers, weights, strict=True))
    assert torch.equal(moved, same)


def test_a_group_s_own_moments_are_used_in_its_ratio():
    weights = [tensor(6, 4), tensor(6, 4)]
    optimizer = optimizer_of([{"params": weights[:1]}, {"params": weights[1:], "betas": (0.5, 0.6)}], "lamb")
    alone = optimizer_of([tensor(6, 4)], "lamb", betas=(0.5, 0.6))
    for seed in (1, 2, 3):
        _, moved = step(optimizer, *(gradient(w, seed) for w in weights))
        (same,) = step(alone, gradient(weights[1], seed))
    torch.testing.assert_close(moved, same)


def test_a_group_s_own_weight_decay_is_used_in_its_ratio_and_may_change():
    weights, keys = [tensor(6, 4), tensor(6, 4)], {"momentum": 0.0}
    optimizer = optimizer_of([{"params": [weight], "weight_decay": 0.0} for weight in weights], "lars", **keys)
    for seed, decay in ((1, 0.5), (2, 0.1)):
        alone = optimizer_of([nn.Parameter(weights[1].detach().clone())], "lars", weight_decay=decay, **keys)
        optimizer.param_groups[1]["weight_decay"] = decay
        _, moved = step(optimizer, *(gradient(w, seed) for w in weights))
        (same,) = step(alone, gradient(weights[1], seed))
        torch.testing.assert_close(moved, same)


def test_where_a_layout_has_no_gradient_the_ratio_is_that_of_zeros(monkeypatch):
    known, unknown = (optimizer_of([tensor(6, 4)], "lamb") for _ in range(2))
    for optimizer in (known, unknown):
        step(optimizer, gradient(tensor(6, 4)))
    monkeypatch.setattr(controller_of(unknown).binding.layout, "gradients", lambda: iter([(0, None)]))
    zeros = torch.zeros(6, 4, dtype=torch.float64)
    torch.testing.assert_close(step(unknown, zeros), step(known, zeros))


@pytest.mark.parametrize(("base", "key"), [("adamw", "trust_coefficient"), ("sgd", "trust_clip"), ("lars", "betas"),
                                           ("lars", "nesterov"), ("lamb", "momentum")])  # fmt: skip
def test_keys_of_another_rule_are_refused_by_name(base, key):
    values = {"trust_coefficient": 0.1, "trust_clip": [0, 1], "betas": (0.9, 0.99), "nesterov": True, "momentum": 0.5}
    with pytest.raises(ConfigError, match=rf'"{key}" belongs to "base" .* but "base" is "{base}"'):
        LENA([tensor(2, 2)], base=base, **PLAIN, **{key: values[key]})
