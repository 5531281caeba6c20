"""Tensors that are not dense move as torch's default optimizers move them, and the memory beside them stays.

torch's fused kernels walk through memory whatever the strides are.
"""

import pytest
import torch
from torch import nn

from ds_lena import LENA, UnsupportedError
from tests.unit.test_rules import OPTIMIZERS

LR, WEIGHT_DECAY, UPDATES = 0.01, 0.1, 4

VIEWS = {
    "columns": lambda whole: whole[:, :4],
    "every second column": lambda whole: whole[:, ::2],
    "turned columns": lambda whole: whole.t()[:4],
    "a block": lambda whole: whole[2:5, 3:6],
    "one column": lambda whole: whole[:, 0],
    "every third element": lambda whole: whole.view(-1)[::3],
    "four dimensions": lambda whole: whole.view(2, 2, 4, 4).transpose(1, 3)[:, :3, ::2],
    "dense, but turned": lambda whole: whole.t(),
}


def numbers(shape=(8, 8), seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expanded(gradient):
    return gradient.new_full((1,), 0.5).expand(gradient.shape)


def spread_out(gradient):
    return gradient.new_empty(*gradient.shape[:-1], 2 * gradient.shape[-1])[..., ::2].copy_(gradient)


FORMS = {"as it comes": lambda gradient: gradient, "expanded": expanded, "spread out": spread_out}


def ours(parameter, name):
    keys = OPTIMIZERS[name][1] | {"base": name.split()[0], "weight_decay": WEIGHT_DECAY}
    return LENA([parameter], lr=LR, scaling="none", warmup="none", **keys)


def torchs(parameter, name):
    make, options = OPTIMIZERS[name]
    return make([parameter], lr=LR, weight_decay=WEIGHT_DECAY, **options)


def train(optimizer, form=FORMS["as it comes"]):
    (parameter,) = optimizer.param_groups[0]["params"]
    for seed in range(1, UPDATES + 1):
        (parameter * numbers(parameter.shape, seed)).sum().backward()
        parameter.grad = form(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()


def expected(weight, name, form):
    """By torch's default, on the same view. LAMB and LARS are not torch's: by LENA, on a dense copy."""
    if name.startswith(("lamb", "lars")):
        parameter = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
        train(ours(parameter, name), lambda gradient: form(gradient).contiguous())
    else:
        parameter = nn.Parameter(weight)
        train(torchs(parameter, name), form)
    return parameter.detach()


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_view_moves_as_by_torchs_default_and_the_memory_beside_it_stays(name, view, form):
    whole = numbers()
    parameter = nn.Parameter(view(whole))
    train(ours(parameter, name), form)
    torch.testing.assert_close(parameter.detach(), expected(view(numbers()), name, form), rtol=1e-5, atol=1e-7)
    is_outside = torch.ones_like(whole, dtype=torch.bool)
    view(is_outside).fill_(False)
    assert torch.equal(whole[is_outside], numbers()[is_outside])
    assert not torch.equal(view(whole), view(numbers()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_parameters_may_share_a_matrix(name):
    whole = numbers()
    parameters = [nn.Parameter(whole[:, :4]), nn.Parameter(whole[:, 4:])]
    for parameter in parameters:
        train(ours(parameter, name))
    wanted = [expected(half, name, FORMS["as it comes"]) for half in numbers().split(4, dim=1)]
    torch.testing.assert_close(whole, torch.cat(wanted, dim=1), rtol=1e-5, atol=1e-7)


def loaded(optimizer, form):
    """The same optimizer with a state that lies in another form."""
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        state |= {key: form(value) for key, value in state.items() if value.dim()}
    optimizer.load_state_dict(saved)
    return optimizer


@pytest.mark.parametrize("view", ["columns", "one column"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_loaded_state_may_be_spread_out(name, view):
    parameters = [nn.Parameter(VIEWS[view](numbers())) for _ in range(2)]
    for parameter, form in zip(parameters, (FORMS["as it comes"], spread_out), strict=True):
        optimizer = ours(parameter, name)
        train(optimizer)
        train(loaded(optimizer, form))
    assert torch.equal(*parameters)


def test_a_loaded_state_may_be_expanded():
    parameter, other = (nn.Parameter(numbers((6,))) for _ in range(2))
    for weight, form in ((parameter, expanded), (other, lambda value: torch.full_like(value, 0.5))):
        optimizer = ours(weight, "adamw")
        train(optimizer)
        train(loaded(optimizer, form))
    assert torch.equal(parameter, other)


def test_an_expanded_parameter_is_refused():
    with pytest.raises(UnsupportedError, match=r"shape \(4, 3\) is expanded.*clone\(\)"):
        LENA([nn.Parameter(torch.ones(3).expand(4, 3))])
