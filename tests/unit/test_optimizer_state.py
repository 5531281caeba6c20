"""Checkpoints in plain PyTorch: a resumed run is the run, and AdamW's checkpoint can be gone on from."""

import io

import pytest
import torch
from torch import nn

import ds_lena
from ds_lena import LENA, StateError
from ds_lena.optimizer import controller_of
from tests.unit.support import random_gradients, train_window, weights

KEYS = {
    "adamw": {"lr": 0.01, "total_steps": 40},
    "sgd": {"base": "sgd", "lr": 0.01, "nesterov": True, "total_steps": 40},
    "authors-code": {"variant": "authors-code", "lr": 0.01, "total_steps": 40},
    "base batch": {"lr": 0.01, "base_batch_size": 8, "micro_batch_size": 4, "warmup": "fixed", "total_steps": 40},
}


def train(optimizer, parameters, updates):
    for t in updates:
        train_window(optimizer, parameters, random_gradients(parameters, n=2 + t % 3, seed=t))


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def copies(parameters):
    return [nn.Parameter(p.detach().clone()) for p in parameters]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
def test_a_resumed_run_is_bit_for_bit_the_run(keys, dtype):
    steady = weights(5, 3, dtype=dtype)
    optimizer = LENA(steady, **keys)
    train(optimizer, steady, range(10))

    resumed = copies(steady)
    other = LENA(resumed, **keys)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert ds_lena.report(other) == ds_lena.report(optimizer)

    train(optimizer, steady, range(10, 20))
    train(other, resumed, range(10, 20))
    assert all(torch.equal(one, two) for one, two in zip(steady, resumed, strict=True))
    assert ds_lena.report(other) == ds_lena.report(optimizer)


def test_a_checkpoint_before_the_first_update():
    parameters = weights(5)
    other = LENA(parameters, total_steps=40)
    other.load_state_dict(through_a_file(LENA(weights(5), total_steps=40).state_dict()))
    train(other, parameters, range(2))
    assert controller_of(other).schedule.updates == 2


def test_the_state_of_the_method_is_small_and_by_layer_name():
    pairs = list(zip(["body", "head"], weights(500, 3), strict=True))
    optimizer = LENA(pairs, total_steps=40)
    train(optimizer, [p for _, p in pairs], range(2))
    state = optimizer.state_dict()["lena"]
    assert set(state["layers"]) == {"body", "head"}
    assert not any(isinstance(value, torch.Tensor) for value in state.values())


def test_adamw_s_checkpoint_keeps_its_moments_and_starts_lena_fresh(caplog):
    keys = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    theirs = weights(5, 3)
    adamw = torch.optim.AdamW(theirs, **keys)

    def step_of_adamw(updates):
        for t in updates:
            (gradients,) = random_gradients(theirs, n=1, seed=t)
            for parameter, gradient in zip(theirs, gradients, strict=True):
                parameter.grad = gradient
            adamw.step()

    step_of_adamw(range(5))
    ours = copies(theirs)
    lena = LENA(ours, warmup="none", lr=1.0)
    lena.load_state_dict(through_a_file(adamw.state_dict()))
    assert "holds no LENA state" in caplog.text
    assert controller_of(lena).schedule.updates == 0

    step_of_adamw(range(5, 10))
    for t in range(5, 10):
        train_window(lena, ours, random_gradients(ours, n=1, seed=t))
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


def test_a_checkpoint_of_other_parameters_is_refused():
    with pytest.raises(ValueError, match="parameter group"):
        LENA(weights(5), total_steps=40).load_state_dict(LENA(weights(5, 3), total_steps=40).state_dict())


def test_a_checkpoint_of_the_other_variant_is_refused():
    saved = LENA(weights(5), total_steps=40, variant="authors-code").state_dict()
    with pytest.raises(StateError, match='"variant"'):
        LENA(weights(5), total_steps=40).load_state_dict(saved)


def test_a_refused_checkpoint_changes_nothing():
    parameters = weights(5)
    optimizer = LENA(parameters, lr=0.01, total_steps=40)
    train(optimizer, parameters, range(3))
    before = through_a_file(optimizer.state_dict())
    other = LENA(weights(5), lr=0.5, total_steps=40, variant="authors-code").state_dict()
    with pytest.raises(StateError):
        optimizer.load_state_dict(other)
    after = optimizer.state_dict()
    assert after["lena"] == before["lena"]
    assert after["param_groups"] == before["param_groups"]
    assert torch.equal(after["state"][0]["exp_avg"], before["state"][0]["exp_avg"])


@pytest.mark.parametrize("has_lena", [True, False])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda groups: groups[0].update(lr=float("nan")), 'group 0 of the checkpoint has "lr": nan; allowed is a num'),
        (lambda groups: groups[1].update(lr=-0.1), 'group 1 of the checkpoint has "lr": -0.1'),
        (lambda groups: groups[1].update(lr=torch.tensor(-0.5)), 'has "lr": tensor(-0.5'),
        (lambda groups: groups[0].update(weight_decay=None), 'has "weight_decay": None'),
        (lambda groups: groups[0].update(betas=(0.9, 1.5)), 'has "betas": (0.9, 1.5); allowed is two numbers in [0'),
        (lambda groups: groups[1].pop("betas"), 'group 1 of the checkpoint has no "betas", which "base": "adamw" need'),
        (lambda groups: groups[0].update(lena="no"), "has \"lena\": 'no'; allowed is true or false"),
        (lambda groups: groups.__setitem__(0, 3), '"param_groups" of the checkpoint is [3, {'),
    ],
)
def test_damaged_groups_are_refused_and_nothing_changes(change, told, has_lena):
    one, two = weights(5, 3)
    optimizer = LENA([{"params": [one]}, {"params": [two], "lr": 0.5}], lr=0.01, total_steps=40)
    train(optimizer, [one, two], range(3))
    before = through_a_file(optimizer.state_dict())
    saved = through_a_file(optimizer.state_dict())
    if not has_lena:
        del saved["lena"]
        for group in saved["param_groups"]:
            group["lena_state"] = None
    change(saved["param_groups"])
    with pytest.raises(StateError) as raised:
        optimizer.load_state_dict(saved)
    assert told in str(raised.value) and any(way in str(raised.value) for way in ("Restore the file", "weights only"))
    after = optimizer.state_dict()
    assert after["lena"] == before["lena"] and after["param_groups"] == before["param_groups"]


def test_a_state_without_groups_is_refused():
    with pytest.raises(StateError, match='"param_groups" of the checkpoint is None'):
        LENA(weights(5), total_steps=40).load_state_dict({"state": {}})


def test_a_learning_rate_of_0_is_loaded():
    parameters = weights(5)
    optimizer = LENA(parameters, total_steps=40)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["lr"] = 0.0
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0
