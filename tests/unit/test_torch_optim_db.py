"""torch's own lists of what its AdamW and SGD are tested with, and LENA without scaling in place of them."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

from ds_lena import LENA, ConfigError
from ds_lena.keys import KEYS

RULES = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
INFO = {base: next(info for info in optim_db if info.optim_cls is rule) for base, rule in RULES.items()}
FLAGS = {flag for info in INFO.values() for flag in (*info.supported_impls, "capturable")}

INPUTS = [(base, given.kwargs) for base, info in INFO.items() for given in info.optim_inputs_func(device="cpu")]
KNOWN = [(base, keys) for base, keys in INPUTS if keys.keys() <= KEYS.keys()]
UNKNOWN = [(base, keys) for base, keys in INPUTS if not keys.keys() <= KEYS.keys()]
UNKNOWN += [(base, {flag: True}) for base in RULES for flag in sorted(FLAGS)]

ERRORS = [
    (base, error)
    for base, info in INFO.items()
    for error in info.optim_error_inputs_func(device="cpu", dtype=torch.float32)
    if error.optimizer_error_input.kwargs.keys() <= KEYS.keys()
]
SCHEDULERS = [(base, schedulers) for base, info in INFO.items() for schedulers in info.scheduler_inputs]


def name(value):
    return value.optimizer_error_input.desc if hasattr(value, "optimizer_error_input") else None


def lena(base, params, **keys):
    """LENA as torch's rule: SGD has no momentum there unless it is given."""
    momentum = {"momentum": 0.0} if base == "sgd" else {}
    return LENA(params, base=base, **{"scaling": "none", "warmup": "none"} | momentum | copy.deepcopy(keys))


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid()).double()


def train(model, optimizer, schedulers=(), updates=7):
    """Updates on one batch, the fourth without gradients; the loss before each."""
    inputs = torch.linspace(0.1, 0.6, 6, dtype=torch.float64).reshape(3, 2)
    losses = []
    for update in range(updates):
        optimizer.zero_grad()
        loss = model(inputs).sum()
        losses.append(loss.item())
        if update != 3:
            loss.backward()
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step(*([loss.item()] if isinstance(scheduler, ReduceLROnPlateau) else []))
    return losses


def require_equal(model, optimizer, theirs, their_optimizer):
    for one, two in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)
        state = their_optimizer.state[two]
        for key in state.keys() - {"step"}:
            if state[key] is not None:
                torch.testing.assert_close(optimizer.state[one][key], state[key], rtol=1e-9, atol=1e-12)


def test_the_lists_are_there():
    assert {base for base, _ in KNOWN} == set(RULES)
    assert {base for base, _ in ERRORS} == {base for base, _ in SCHEDULERS} == set(RULES)


@pytest.mark.parametrize(("base", "keys"), KNOWN, ids=str)
def test_it_moves_as_torch_s_rule(base, keys):
    model, theirs = small_model(), small_model()
    optimizer, their_optimizer = lena(base, model.parameters(), **keys), RULES[base](theirs.parameters(), **keys)
    losses = train(model, optimizer)
    assert losses == pytest.approx(train(theirs, their_optimizer), rel=1e-9)
    assert losses[-1] < losses[0]
    require_equal(model, optimizer, theirs, their_optimizer)


@pytest.mark.parametrize(("base", "keys"), KNOWN, ids=str)
def test_keys_may_stand_in_groups(base, keys):
    model, theirs = small_model(), small_model()
    optimizers = []
    for one, make in ((model, lambda groups: lena(base, groups)), (theirs, RULES[base])):
        decayed = {"params": [p for p in one.parameters() if p.dim() > 1], **keys}
        rest = {"params": [p for p in one.parameters() if p.dim() <= 1], **keys, "weight_decay": 0.0}
        optimizers.append(make([decayed, rest]))
        train(one, optimizers[-1])
    require_equal(model, optimizers[0], theirs, optimizers[1])


@pytest.mark.parametrize(("base", "schedulers"), SCHEDULERS)
def test_it_moves_as_torch_s_rule_under_schedulers(base, schedulers):
    model, theirs = small_model(), small_model()
    optimizer, their_optimizer = lena(base, model.parameters(), lr=0.01), RULES[base](theirs.parameters(), lr=0.01)
    for one, of in ((model, optimizer), (theirs, their_optimizer)):
        train(one, of, [make(of) for make in schedulers])
    require_equal(model, optimizer, theirs, their_optimizer)
    assert optimizer.param_groups[0]["lr"] == their_optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize(("base", "keys"), UNKNOWN, ids=str)
def test_an_argument_that_lena_has_not_is_named(base, keys):
    unknown = next(key for key in keys if key not in KEYS)
    with pytest.raises(ConfigError, match=f'unknown key "{unknown}"'):
        lena(base, small_model().parameters(), **keys)


@pytest.mark.parametrize(("base", "error"), ERRORS, ids=name)
def test_what_torch_refuses_is_refused(base, error):
    assert error.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    given = error.optimizer_error_input
    params = [nn.Parameter(torch.ones(2))] if given.params is None else given.params
    expected = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
    with expected(error.error_type):
        lena(base, params, **given.kwargs)
