"""LENA as one of torch's optimizers: what holds for all of them, whatever their rule. Gradients come from backward().

What torch's optimizers can do and LENA cannot is listed in `REFUSED`, each with its reason.
"""

import copy
import io
import pickle
import types

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import ds_lena
from ds_lena import LENA, ConfigError, StateError, UnsupportedError
from ds_lena.keys import BASES

CONSTANT = {"scaling": "none", "warmup": "none"}


def make(base="adamw", dtype=torch.float32, seed=0, **keys):
    """A model, an optimizer of all its parameters, and a function that is one update on a batch of its own."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    return model, LENA(model.parameters(), lr=0.01, base=base, **(CONSTANT | keys))


def train(model, optimizer, updates):
    for update in updates:
        optimizer.zero_grad()
        loss_of(model, update).backward()
        optimizer.step()


def loss_of(model, seed):
    inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
    return model(inputs.to(next(model.parameters()))).square().mean()


def same(model, other):
    return all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))


# -- refused ----------------------------------------------------------------------------------------------------------

REFUSED = {
    "deepcopy": (copy.deepcopy, StateError, "bound to its parameters by hooks"),
    "pickle": (pickle.dumps, StateError, "bound to its parameters by hooks"),
    "a group that is added later": (
        lambda optimizer: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]}),
        UnsupportedError,
        "Give all parameters, the frozen ones too",
    ),
    "a second step after one backward": (
        lambda optimizer: (fill_in_by_backward(optimizer), optimizer.step(), optimizer.step()),
        StateError,
        r"Was step\(\) called twice after one backward\(\)",
    ),
    "gradients that were filled in by hand": (
        lambda optimizer: (fill_in(optimizer), optimizer.step()),
        StateError,
        "LENA has to see each micro-gradient",
    ),
    **{
        f"the argument {name}": (
            lambda _, name=name: make(**{name: True}),
            ConfigError,
            rf'unknown key "{name}" .*{reason}.* Leave the key out',
        )
        for name, reason in {
            "foreach": "fused kernels by itself",
            "fused": "fused kernels by itself",
            "capturable": "CUDA graph",
            "differentiable": "cannot be differentiated",
            "maximize": "LENA minimizes",
            "amsgrad": "no AMSGrad",
            "dampening": "no dampening",
        }.items()
    },
}
"""What is done, how it is refused, and the reason that the message gives.

Other forms of parameters (complex, float16, sparse gradients, several devices, sharded) and GradScaler are in
test_optimizer_parameters.py.
"""


def fill_in_by_backward(optimizer):
    sum(parameter.sum() for parameter in optimizer.param_groups[0]["params"]).backward()


def fill_in(optimizer):
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)


@pytest.mark.parametrize(("act", "error", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused(act, error, reason):
    _, optimizer = make()
    with pytest.raises(error, match=reason):
        act(optimizer)


# -- what is handed over ----------------------------------------------------------------------------------------------

W, V = (nn.Parameter(torch.ones(2)) for _ in range(2))
FORMS = {
    "a list": lambda: [W, V],
    "a generator": lambda: (p for p in (W, V)),
    "a view of a dict": lambda: {"w": W, "v": V}.values(),
    "groups of one tensor": lambda: [{"params": W}, {"params": V}],
    "a group of a generator": lambda: [{"params": (p for p in (W, V))}],
    "an empty group": lambda: [{"params": []}, {"params": [W, V]}],
    "with names": lambda: [("w", W), ("v", V)],
    "groups with names": lambda: [{"params": [("w", W)]}, {"params": iter([("v", V)])}],
}
WRONG_FORMS = {
    "one tensor": lambda: W,
    "nothing": lambda: [],
    "a set in a group": lambda: [{"params": {W, V}}],
    "a number": lambda: [1.0],
    "no leaf": lambda: [W * 1],
    "in two groups": lambda: [{"params": W}, {"params": W}],
    "names for some": lambda: [("w", W), V],
    "names in some groups": lambda: [{"params": [W]}, {"params": [("v", V)]}],
}


def described(groups):
    return [{"params": [id(p) for p in group["params"]], "names": group.get("param_names")} for group in groups]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_parameters_are_taken_as_torch_takes_them(form):
    assert described(LENA(form(), **CONSTANT).param_groups) == described(torch.optim.AdamW(form()).param_groups)


@pytest.mark.parametrize("form", WRONG_FORMS.values(), ids=WRONG_FORMS)
def test_parameters_that_torch_refuses_are_refused(form):
    with pytest.raises((TypeError, ValueError)) as by_torch:
        torch.optim.AdamW(form()).step()
    with pytest.raises(type(by_torch.value)):
        LENA(form(), **CONSTANT)


def test_a_parameter_that_is_given_twice_is_warned_of():
    with pytest.warns(UserWarning, match="duplicate parameters"):
        LENA([W, W], **CONSTANT)


# -- what a user sees -------------------------------------------------------------------------------------------------


def test_the_public_names_are_those_of_torch_s_optimizers():
    model, optimizer = make()
    assert [name for name in dir(LENA) if not name.startswith("_") and not hasattr(torch.optim.Optimizer, name)] == []
    theirs = vars(torch.optim.SGD(model.parameters()))
    assert [name for name in vars(optimizer) if not name.startswith("_") and name not in theirs] == []


@pytest.mark.parametrize("base", BASES)
def test_it_can_be_printed(base):
    _, optimizer = make(base)
    assert repr(optimizer).startswith("LENA (\nParameter Group 0\n")
    assert "lr: 0.01\n" in repr(optimizer)


def test_the_state_is_a_default_dict_that_is_empty_before_the_first_step():
    model, optimizer = make()
    assert not optimizer.state
    assert optimizer.state[model[0].weight] == {}


def test_the_profiler_sees_step_and_zero_grad():
    model, optimizer = make()
    with torch.autograd.profiler.profile() as profile:
        train(model, optimizer, range(1))
    names = {event.key for event in profile.key_averages()}
    assert {"Optimizer.step#LENA.step", "Optimizer.zero_grad#LENA.zero_grad"} <= names


# -- step -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("frozen", [False, True], ids=["without gradients", "frozen"])
def test_a_step_without_gradients_moves_nothing_and_returns_the_loss(base, frozen):
    model, _ = make()
    before = copy.deepcopy(model)
    optimizer = LENA(model.requires_grad_(not frozen).parameters(), base=base, weight_decay=0.1, **CONSTANT)
    assert optimizer.step() is None
    assert optimizer.step(lambda: 3.0) == 3.0
    assert same(model, before)


@pytest.mark.parametrize("base", BASES)
def test_gradients_of_zero_move_nothing_without_decay(base):
    model, optimizer = make(base, weight_decay=0)
    before = copy.deepcopy(model)
    (0 * loss_of(model, 0)).backward()
    optimizer.step()
    assert same(model, before)


@pytest.mark.parametrize("base", ["adamw", "sgd"])
def test_tensors_without_dimensions_or_elements_are_moved_along(base):
    scalar, empty = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.ones(0, 3))
    optimizer = LENA([scalar, empty], base=base, **CONSTANT)
    (scalar.square() + empty.sum()).backward()
    optimizer.step()
    assert scalar < 1


def test_hooks_around_the_step_in_torch_s_order():
    model, optimizer = make()
    calls = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: calls.append("own before")),
        optimizer.register_step_post_hook(lambda *_: calls.append("own after")),
        register_optimizer_step_pre_hook(lambda *_: calls.append("global before")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global after")),
    ]
    train(model, optimizer, range(1))
    for handle in handles:
        handle.remove()
    train(model, optimizer, range(1))
    assert calls == ["global before", "own before", "own after", "global after"]


def test_a_hook_before_the_step_may_change_the_gradients():
    model, optimizer = make("sgd", momentum=0)
    before = copy.deepcopy(model)
    optimizer.register_step_pre_hook(lambda *_: [p.grad.zero_() for p in model.parameters()] and None)
    train(model, optimizer, range(2))
    assert same(model, before)


def test_a_compiled_model_trains_as_it_is():
    model, optimizer = make()
    other, for_compiled = make()
    train(model, optimizer, range(3))
    train(torch.compile(other, backend="aot_eager"), for_compiled, range(3))
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two)


# -- learning rates ---------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, step_size=2),
    "LambdaLR from 0": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda update: update / 5),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=5),
    "ReduceLROnPlateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
}


@pytest.mark.parametrize("of_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_scheduler_does_to_it_what_it_does_to_adamw(schedule, of_tensor):
    runs = []
    for lena in (True, False):
        model, _ = make()
        groups = [{"params": model[0].parameters(), "lr": 0.02}, {"params": model[2].parameters()}]
        lr = torch.tensor(0.01) if of_tensor else 0.01
        optimizer = LENA(groups, lr, **CONSTANT) if lena else torch.optim.AdamW(groups, lr)
        scheduler = schedule(optimizer)
        for update in range(4):
            train(model, optimizer, [update])
            scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
        runs.append((model, [group["lr"] for group in optimizer.param_groups]))
    (ours, our_rates), (theirs, their_rates) = runs
    assert our_rates == their_rates
    assert [type(rate) for rate in our_rates] == [type(rate) for rate in their_rates]
    for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("lr", [torch.tensor(0.01), torch.tensor([0.01])], ids=["no dimension", "one dimension"])
@pytest.mark.parametrize("base", BASES)
def test_a_learning_rate_may_be_a_tensor_of_one_element(base, lr):
    model, optimizer = make(base)
    other, _ = make(base)
    train(model, optimizer, range(3))
    train(other, LENA(other.parameters(), lr, base=base, **CONSTANT), range(3))
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("lr", [0.0, -0.1, float("nan"), [0.1, 0.1]], ids=str)
def test_a_tensor_that_is_no_learning_rate_is_refused(lr):
    with pytest.raises(ConfigError, match='"lr"'):
        LENA([W], torch.tensor(lr), **CONSTANT)


# -- state dicts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
def test_state_dicts_are_the_same_for_the_same_run(base):
    keys = {"warmup": "layer", "scaling": "gain", "total_steps": 20}
    model, optimizer = make(base, **keys)
    train(model, optimizer, range(4))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other, resumed = make(base, seed=1, **keys)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for run in ((model, optimizer), (other, resumed)):
        train(*run, range(4, 8))
    assert same(model, other)
    assert packed(resumed) == packed(optimizer)


def packed(optimizer):
    """A state dict with numbers in place of tensors, to be compared."""
    state = optimizer.state_dict()
    numbers = {i: {key: value.tolist() for key, value in own.items()} for i, own in state["state"].items()}
    return {**state, "state": numbers}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_loaded_state_takes_the_type_of_the_parameters(dtype):
    model, optimizer = make()
    train(model, optimizer, range(2))
    other, resumed = make(dtype=dtype)
    resumed.load_state_dict(optimizer.state_dict())
    types_ = {name: value.dtype for name, value in resumed.state[other[0].weight].items()}
    assert types_ == {"step": torch.float32, "exp_avg": dtype, "exp_avg_sq": dtype}
    train(other, resumed, range(2))


@pytest.mark.parametrize("base", BASES)
def test_a_count_of_steps_may_be_a_number(base):
    model, optimizer = make(base)
    train(model, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = state["step"].item()
    optimizer.load_state_dict(saved)
    train(model, optimizer, range(1))
    assert optimizer.state[model[0].weight]["step"] == 4


@pytest.mark.parametrize("named", [False, True], ids=["into one without names", "into one with names"])
def test_names_are_kept_as_torch_keeps_them(named):
    results = []
    for make_one in (lambda params: LENA(params, **CONSTANT), torch.optim.AdamW):
        old, new = (nn.Linear(2, 2) for _ in range(2))
        saved = make_one(old.parameters() if named else old.named_parameters())
        loaded = make_one(new.named_parameters() if named else new.parameters())
        loaded.load_state_dict(saved.state_dict())
        results.append(loaded.param_groups[0]["param_names"])
    assert results == [["weight", "bias"]] * 2


def test_hooks_see_all_of_a_state_dict_in_torch_s_order():
    calls = []
    model, optimizer = make()
    train(model, optimizer, range(1))
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("before"))
    optimizer.register_state_dict_post_hook(lambda _, state: calls.append(sorted(state)))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "more": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: calls.append(sorted(state)))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append(ds_lena.report(o)["update"]))
    saved = optimizer.state_dict()
    train(model, optimizer, range(2))
    optimizer.load_state_dict(saved)
    assert calls == ["before", ["lena", "param_groups", "state"], ["lena", "more", "param_groups", "state"], 1]


@pytest.mark.parametrize("prepend", [False, True])
def test_a_hook_may_change_what_is_loaded(prepend):
    """As torch advises for checkpoints whose names or order differ."""
    model, optimizer = make()
    train(model, optimizer, range(3))
    saved = optimizer.state_dict()
    _, resumed = make()
    wrapped = {"inside": saved}
    resumed.register_load_state_dict_pre_hook(lambda _, state: state["inside"], prepend=prepend)
    resumed.load_state_dict(wrapped)
    assert ds_lena.report(resumed) == ds_lena.report(optimizer)
    assert list(wrapped) == ["inside"], "what was given is left as it is"


def test_a_load_that_fails_leaves_no_hook_behind():
    _, optimizer = make()
    hooks = types.SimpleNamespace(
        before=optimizer._optimizer_load_state_dict_pre_hooks, after=optimizer._optimizer_load_state_dict_post_hooks
    )
    saved = make("sgd")[1].state_dict()
    with pytest.raises(StateError):
        optimizer.load_state_dict(saved)
    assert not hooks.before
    assert not hooks.after
