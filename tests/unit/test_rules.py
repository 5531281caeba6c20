"""What every update rule must do, and that each is its published optimizer, on whole tensors and on pieces of them.

A new rule needs a line in OPTIMIZERS. Trust ratios over pieces are tested in `test_trust.py`.
"""

import pytest
import torch

from ds_lena import LENA
from ds_lena.keys import BASES
from ds_lena.update.rules import RULES
from tests.helpers import published

UPDATES, SHAPE, SIZE = 6, (37, 3), 111

# Name -> what makes the published optimizer, the options of both. Names begin with that of the rule.
OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, {"betas": (0.8, 0.95), "eps": 1e-6}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": False}),
    "sgd with nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "sgd without momentum": (torch.optim.SGD, {"momentum": 0, "nesterov": False}),
    "lamb": (published.lamb, {"betas": (0.8, 0.95), "eps": 1e-6}),
    "lars": (published.lars, {"momentum": 0.9}),
    "lars without momentum": (published.lars, {"momentum": 0}),
}
LR_IS_INSIDE_THE_MOMENTUM = {"lars"}
TOLERANCE = {
    torch.float64: {"rtol": 1e-13, "atol": 1e-15},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 0, "atol": 0.03},  # a few roundings of numbers near 1
}


def gradients(dtype, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator).to(dtype) for _ in range(UPDATES)]


def start(dtype):
    return torch.linspace(-1, 1, SIZE).view(SHAPE).to(dtype)


def learning_rate(t):
    return 0.1 / (1 + t)


def by_its_authors(name, dtype, weight_decay, lr):
    """In bfloat16 torch's code rounds after every operation, so the comparison is with the same numbers in float64."""
    make, options = OPTIMIZERS[name]
    wide = torch.float64 if dtype == torch.bfloat16 else dtype
    parameter = torch.nn.Parameter(start(dtype).to(wide))
    optimizer = make([parameter], weight_decay=weight_decay, **options)
    for t, gradient in enumerate(gradients(dtype)):
        parameter.grad = gradient.to(wide)
        optimizer.param_groups[0]["lr"] = lr(t)
        optimizer.step()
    return parameter.detach().to(dtype)


def trust_ratio(rule, parameter, gradient, buffers, count, weight_decay, options):
    """Of one whole tensor, with the rule's own functions."""
    wide = torch.promote_types(parameter.dtype, torch.float32)
    total = torch.zeros((), dtype=torch.float64)
    tensors = [tensor.to(wide) for tensor in (parameter, gradient, *buffers)]
    rule.trust.add_square(total, tensors[0], tensors[1], tensors[2:], count, weight_decay, options)
    decay = torch.tensor([weight_decay], dtype=torch.float64)
    norms = parameter.double().norm().view(1), total.sqrt().view(1)
    return float(rule.trust.ratio(*norms, decay, rule.trust.coefficient))


def by_rule(name, dtype, weight_decay, sizes, lr=learning_rate):
    rule, options = RULES[name.split()[0]], OPTIMIZERS[name][1]
    parameter = start(dtype).view(-1)
    buffers = [torch.zeros_like(parameter) for _ in rule.buffers(options)]
    for t, gradient in enumerate(gradients(dtype)):
        gradient, count, rate = gradient.view(-1), torch.tensor(float(t + 1)), lr(t)
        if rule.trust:
            rate *= trust_ratio(rule, parameter, gradient, buffers, count, weight_decay, options)
        cut = [list(tensor.split(sizes)) for tensor in (parameter, gradient, *buffers)]
        rule.move(cut[0], cut[1], cut[2:], count, rate, weight_decay, options)
    return parameter.view(SHAPE)


def schedule_of(name):
    return (lambda t: 0.1) if name.split()[0] in LR_IS_INSIDE_THE_MOMENTUM else learning_rate


@pytest.mark.parametrize("sizes", [[SIZE], [25, 85, 1], [1] * SIZE], ids=["whole", "pieces", "single elements"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rule_is_its_published_optimizer(name, dtype, weight_decay, sizes):
    lr = schedule_of(name)
    moved = by_rule(name, dtype, weight_decay, sizes, lr)
    torch.testing.assert_close(moved, by_its_authors(name, dtype, weight_decay, lr), **TOLERANCE[dtype])
    assert not torch.equal(moved, start(dtype))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_without_scaling_and_warm_up_is_the_published_one(name, weight_decay):
    lr, parameter = schedule_of(name), torch.nn.Parameter(start(torch.float64))
    keys = OPTIMIZERS[name][1] | {"base": name.split()[0], "weight_decay": weight_decay}
    optimizer = LENA([parameter], scaling="none", warmup="none", **keys)
    for t, gradient in enumerate(gradients(torch.float64)):
        optimizer.param_groups[0]["lr"] = lr(t)
        (parameter * gradient).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    theirs = by_its_authors(name, torch.float64, weight_decay, lr)
    torch.testing.assert_close(parameter.detach(), theirs, **TOLERANCE[torch.float64])


def test_the_learning_rate_of_lars_is_inside_of_its_momentum():
    rule, parameter, velocity = RULES["lars"], torch.zeros(1), torch.zeros(1)
    for count, lr in enumerate((1.0, 10.0), start=1):
        rule.move([parameter], [torch.ones(1)], [[velocity]], torch.tensor(float(count)), lr, 0.0, {"momentum": 0.5})
    assert velocity.item() == 0.5 * 1 + 10
    assert parameter.item() == -(1 + 10.5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pieces_move_as_the_whole_does(name):
    whole, cut = (by_rule(name, torch.float32, 0.1, sizes) for sizes in ([SIZE], [16, 8, 87]))
    torch.testing.assert_close(cut, whole, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_learning_rate_on_the_device_is_as_good_as_a_number(name):
    by_number = by_rule(name, torch.float32, 0.1, [SIZE], learning_rate)
    by_tensor = by_rule(name, torch.float32, 0.1, [SIZE], lambda t: torch.tensor(learning_rate(t)))
    torch.testing.assert_close(by_tensor, by_number)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_count_of_updates_is_not_advanced_by_the_rule(name):
    rule, options = RULES[name.split()[0]], OPTIMIZERS[name][1]
    step, parameter = torch.tensor(3.0), torch.ones(2)
    buffers = [[torch.zeros(2)] for _ in rule.buffers(options)]
    rule.move([parameter], [torch.ones(2)], buffers, step, 0.1, 0.0, options)
    assert step.item() == 3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_learning_rate_of_zero_moves_nothing_but_the_buffers(name):
    moved = by_rule(name, torch.float32, 0.1, [SIZE], lr=lambda t: 0.0)
    assert torch.equal(moved, start(torch.float32))


@pytest.mark.parametrize("name", RULES)
def test_a_rule_reads_from_a_group_what_it_says(name):
    assert set(BASES[name].group_keys) == set(OPTIMIZERS[name][1])


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.trust])
def test_measuring_a_trust_ratio_changes_nothing(name):
    rule, options = RULES[name], OPTIMIZERS[name][1]
    tensors = [torch.randn(50, generator=torch.Generator().manual_seed(seed)).abs() for seed in range(4)]
    before = [tensor.clone() for tensor in tensors]
    count = torch.tensor(3.0)
    rule.trust.add_square(torch.zeros((), dtype=torch.float64), *tensors[:2], tensors[2:][: len(rule.buffers(options))],
                          count, 0.1, options)  # fmt: skip
    assert all(torch.equal(now, then) for now, then in zip(tensors, before, strict=True))
    assert count.item() == 3


def test_every_rule_is_tested():
    assert {name.split()[0] for name in OPTIMIZERS} == set(RULES)
