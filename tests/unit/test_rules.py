"""Each update rule is torch.optim's, on whole tensors and on tensors cut into pieces."""

import pytest
import torch

from ds_lena.rules import RULES

UPDATES, SIZE = 6, 37

OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, {"betas": (0.8, 0.95), "eps": 1e-6}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": False}),
    "sgd with nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "sgd without momentum": (torch.optim.SGD, {"momentum": 0, "nesterov": False}),
}
TOLERANCE = {
    torch.float64: {"rtol": 1e-13, "atol": 1e-15},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 0, "atol": 0.03},  # a few roundings of numbers near 1
}


def gradients(dtype, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SIZE, generator=generator).to(dtype) for _ in range(UPDATES)]


def start(dtype):
    return torch.linspace(-1, 1, SIZE).to(dtype)


def learning_rate(t):
    return 0.1 / (1 + t)


def by_torch(name, dtype, weight_decay):
    """In bfloat16 torch's code rounds after every operation, so the comparison is with the same numbers in float64."""
    make, options = OPTIMIZERS[name]
    wide = torch.float64 if dtype == torch.bfloat16 else dtype
    parameter = torch.nn.Parameter(start(dtype).to(wide))
    optimizer = make([parameter], weight_decay=weight_decay, **options)
    for t, gradient in enumerate(gradients(dtype)):
        parameter.grad = gradient.to(wide)
        optimizer.param_groups[0]["lr"] = learning_rate(t)
        optimizer.step()
    return parameter.detach().to(dtype)


def by_rule(name, dtype, weight_decay, sizes, lr=learning_rate):
    rule, options = RULES[name.split()[0]], OPTIMIZERS[name][1]
    parameter = start(dtype)
    buffers = [torch.zeros_like(parameter) for _ in rule.buffers(options)]
    for t, gradient in enumerate(gradients(dtype)):
        cut = [b.split(sizes) for b in buffers]
        rule.update(
            parameter.split(sizes), gradient.split(sizes), cut, torch.tensor(float(t)), lr(t), weight_decay, options
        )
    return parameter


@pytest.mark.parametrize("sizes", [[SIZE], [5, 31, 1], [1] * SIZE], ids=["whole", "pieces", "single elements"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_rule_is_torch_s_optimizer(name, dtype, weight_decay, sizes):
    moved = by_rule(name, dtype, weight_decay, sizes)
    torch.testing.assert_close(moved, by_torch(name, dtype, weight_decay), **TOLERANCE[dtype])
    assert not torch.equal(moved, start(dtype))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pieces_move_as_the_whole_does(name):
    whole, cut = (by_rule(name, torch.float32, 0.1, sizes) for sizes in ([SIZE], [16, 8, 13]))
    torch.testing.assert_close(cut, whole, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_count_of_updates_is_not_advanced_by_the_rule(name):
    rule, options = RULES[name.split()[0]], OPTIMIZERS[name][1]
    step, parameter = torch.tensor(3.0), torch.ones(2)
    buffers = [[torch.zeros(2)] for _ in rule.buffers(options)]
    rule.update([parameter], [torch.ones(2)], buffers, step, 0.1, 0.0, options)
    assert step.item() == 3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_learning_rate_of_zero_moves_nothing_but_the_buffers(name):
    moved = by_rule(name, torch.float32, 0.1, [SIZE], lr=lambda t: 0.0)
    assert torch.equal(moved, start(torch.float32))


@pytest.mark.parametrize("name", RULES)
def test_a_rule_reads_from_a_group_what_it_says(name):
    rule = RULES[name]
    options = OPTIMIZERS[name][1]
    assert set(rule.group_keys) == set(options)
