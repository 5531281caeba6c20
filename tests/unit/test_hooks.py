"""The hooks see every micro-gradient once, count the backward passes, and leave no trace. Checkpointing is apart."""

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ds_lena import LENA, StateError, UnsupportedError, report
from ds_lena.grad_stats.hooks import GradientHooks
from ds_lena.keys import BASES
from ds_lena.optimizer import controller_of
from tests.unit.support import backward, random_gradients, weights


def watch(parameters):
    parameters = list(parameters)
    return GradientHooks(parameters, [f"p{i}" for i in range(len(parameters))])


def squares(gradients):
    return sum(g.square().sum().item() for g in gradients)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def loss(model, seed=0):
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return model(x).square().mean()


def expected_squares(model, seeds):
    """Sum over passes of the squared norm of every parameter's own gradient."""
    gradients = [torch.autograd.grad(loss(model, seed), list(model.parameters())) for seed in seeds]
    return [squares(of_one) for of_one in zip(*gradients, strict=True)]


# -- counting and summing ---------------------------------------------------------------------------------------------


def test_squared_norms_are_those_of_each_pass_and_not_of_the_running_sum():
    parameters = weights(4, 2)
    hooks = watch(parameters)
    gradients = random_gradients(parameters, n=3, seed=1)
    for each in gradients:
        backward(parameters, each)
    assert hooks.passes == 3
    assert hooks.sums[:2].tolist() == pytest.approx([squares(of_one) for of_one in zip(*gradients, strict=True)])


def test_a_real_model_accumulating_over_passes(model):
    hooks = watch(model.parameters())
    truth = expected_squares(model, seeds=range(4))
    for seed in range(4):
        loss(model, seed).backward()
    assert hooks.passes == 4
    assert hooks.sums[:4].tolist() == pytest.approx(truth)


def test_parameters_whose_norms_are_not_wanted_are_only_watched():
    parameters = weights(1, 1, 1)
    hooks = watch(parameters)
    hooks.watch([True, False, True])
    backward(parameters, [torch.tensor([2.0]), torch.tensor([100.0]), torch.tensor([3.0])])
    assert hooks.sums.tolist() == [4, 0, 9]
    assert hooks.last_pass == [1, 1, 1]


def test_clearing_starts_a_new_window():
    parameters = weights(2)
    hooks = watch(parameters)
    backward(parameters, [torch.ones(2)])
    hooks.clear()
    assert (hooks.passes, hooks.sums.tolist(), hooks.last_pass) == (0, [0], [0])
    backward(parameters, [torch.ones(2)])
    assert hooks.passes == 1
    assert hooks.sums.tolist() == pytest.approx([2])


def test_the_last_pass_that_reached_a_parameter_is_known():
    parameters = weights(2, 2, 2)
    hooks = watch(parameters)
    backward(parameters, [torch.ones(2), None, None])
    backward(parameters, [torch.ones(2), None, torch.ones(2)])
    assert hooks.last_pass == [2, 0, 2]


def test_a_tied_weight_has_one_gradient():
    embed, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    head.weight = embed.weight
    hooks = watch([embed.weight])
    head(embed(torch.tensor([0, 3]))).square().sum().backward()
    assert hooks.passes == 1
    assert hooks.sums[0].item() == pytest.approx(squares([embed.weight.grad]), rel=1e-6)


def test_several_losses_in_one_pass_are_one_micro_gradient(model):
    hooks = watch(model.parameters())
    torch.autograd.backward([loss(model, 0), loss(model, 1)])
    assert hooks.passes == 1
    assert hooks.sums[0].item() == pytest.approx(squares([model[0].weight.grad]))


def test_two_passes_through_one_graph_are_two_micro_gradients(model):
    hooks = watch(model.parameters())
    value = loss(model)
    value.backward(retain_graph=True)
    value.backward()
    assert hooks.passes == 2


def test_callers_are_told_before_and_after_each_pass():
    parameters = weights(2, 2)
    hooks, events = watch(parameters), []
    hooks.before_pass = lambda: events.append(("before", parameters[1].grad is None))
    hooks.after_pass = lambda: events.append(("after", parameters[1].grad is None))
    backward(parameters, [None, torch.ones(2)])
    backward(parameters, [None, torch.ones(2)])
    assert events == [("before", True), ("after", False), ("before", False), ("after", False)]


def test_a_window_without_a_pass_is_an_error():
    hooks = watch(weights(2))
    with pytest.raises(StateError, match="no backward pass was seen"):
        hooks.require_passes()


# -- what is a micro-gradient, and what is not ------------------------------------------------------------------------


def test_gradients_that_are_returned_and_not_accumulated_are_no_micro_gradient(model):
    hooks = watch(model.parameters())
    torch.autograd.grad(loss(model), list(model.parameters()))
    torch.autograd.grad(loss(model), [model[0].weight])
    assert (hooks.passes, hooks.sums.sum().item()) == (0, 0)


def test_a_gradient_penalty_is_part_of_its_pass(model):
    truth = copy.deepcopy(model)
    hooks = watch(model.parameters())
    for each in (model, truth):
        gradients = torch.autograd.grad(loss(each), list(each.parameters()), create_graph=True)
        (loss(each) + sum(g.square().sum() for g in gradients)).backward()
    assert hooks.passes == 1
    assert hooks.sums[0].item() == pytest.approx(squares([truth[0].weight.grad]))


def test_returned_gradients_between_two_passes_do_not_disturb_them(model):
    hooks = watch(model.parameters())
    truth = expected_squares(model, seeds=(0, 1))
    loss(model, 0).backward()
    torch.autograd.grad(loss(model, 5), list(model.parameters()))
    loss(model, 1).backward()
    assert hooks.passes == 2
    assert hooks.sums[:4].tolist() == pytest.approx(truth)


def test_a_pass_for_some_parameters_only_is_a_micro_gradient_of_those(model):
    hooks = watch(model.parameters())
    loss(model).backward(inputs=[model[2].weight])
    assert hooks.passes == 1
    assert hooks.last_pass == [0, 0, 1, 0]


def test_a_pass_that_reaches_no_watched_parameter_is_not_counted(model):
    hooks = watch(model[0].parameters())
    model[2](torch.ones(1, 4, dtype=torch.float64)).sum().backward()
    assert hooks.passes == 0


# -- gradients that are thrown away, passes that are broken off ------------------------------------------------------


def test_a_gradient_that_was_thrown_away_is_forgotten_and_with_the_last_one_the_window(model):
    hooks = watch(model.parameters())
    loss(model).backward()
    hooks.forget([0, 1])
    assert hooks.passes == 1 and hooks.reached() == [2, 3]
    assert hooks.sums[:2].tolist() == [0, 0] and hooks.sums[2:4].min() > 0
    hooks.forget([2, 3])
    assert hooks.passes == 0 and hooks.sums.tolist() == [0] * 4


def broken_backward(model, seed):
    """A backward pass that an exception ends before the first layer; the squared norms of what it has added."""

    def fail(gradient):
        raise MemoryError

    handle = model[0].bias.register_hook(fail)
    before = [parameter.grad for parameter in model.parameters()]
    before = [None if gradient is None else gradient.clone() for gradient in before]
    with pytest.raises(MemoryError):
        loss(model, seed).backward()
    handle.remove()
    pairs = zip(before, (parameter.grad for parameter in model.parameters()), strict=True)
    return [0 if now is None else squares([now if was is None else now - was]) for was, now in pairs]


@pytest.mark.parametrize("forgets", [False, True])
def test_a_pass_that_an_exception_has_ended_counts_as_far_as_it_came_or_is_forgotten(model, forgets):
    hooks = watch(model.parameters())
    seen = []

    def before_pass():
        seen.append(hooks.is_broken_off)
        if forgets and hooks.is_broken_off:
            hooks.forget_broken_pass()

    hooks.before_pass = before_pass
    whole = expected_squares(model, seeds=(0, 2))
    loss(model, 0).backward()
    part = broken_backward(model, 1)
    assert part[2] > 0 and part[0] == 0
    loss(model, 2).backward()
    assert seen == [False, False, True]
    assert hooks.passes == (2 if forgets else 3)
    wanted = whole if forgets else [a + b for a, b in zip(whole, part, strict=True)]
    assert hooks.sums[2:4].tolist() == pytest.approx(wanted[2:4])


@pytest.mark.parametrize("throws_away", [False, True])
def test_a_gradient_that_waits_and_is_changed_after_a_broken_pass(model, throws_away, monkeypatch):
    monkeypatch.setattr("ds_lena.grad_stats.norms.is_batched", lambda tensor: True)
    optimizer = LENA(model.named_parameters(), total_steps=9)
    loss(model, 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    broken_backward(model, 1)
    if throws_away:
        optimizer.zero_grad()
        loss(model, 2).backward()
        optimizer.step()
        assert report(optimizer)["n"] == 1
        return
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.raises(StateError, match="after an exception had ended the pass"):
        loss(model, 2).backward()


def test_a_reentrant_segment_after_a_broken_pass_is_not_taken_for_a_part_of_it(model):
    hooks = watch(model.parameters())
    broken_backward(model, 1)
    x = torch.ones(5, 3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(UnsupportedError, match="the first gradient of a backward pass"):
        checkpoint(model, x, use_reentrant=True).square().mean().backward()
    assert hooks.passes == 1


# -- a user's own hooks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["before", "after", "between passes"])
@pytest.mark.parametrize("name", ["0.weight", "2.bias"], ids=["late in the pass", "first in the pass"])
def test_what_is_measured_is_what_is_added(model, place, name):
    parameter = model.get_parameter(name)
    index = [each for each, _ in model.named_parameters()].index(name)

    def halve():
        parameter.register_hook(lambda gradient: 0.5 * gradient)

    if place == "before":
        halve()
    hooks = watch(model.parameters())
    if place == "after":
        halve()
    wanted = 0.0
    for seed in range(3):
        if place == "between passes" and seed == 1:
            halve()
        parameter.grad = None
        loss(model, seed).backward()
        wanted += squares([parameter.grad])
    assert hooks.passes == 3
    assert hooks.sums[index].item() == pytest.approx(wanted)


def test_a_hook_that_is_taken_off_again(model):
    hooks = watch(model.parameters())
    handle = model[2].bias.register_hook(lambda gradient: 0.5 * gradient)
    loss(model, 0).backward()
    handle.remove()
    model[2].bias.grad, before = None, hooks.sums[3].item()
    loss(model, 1).backward()
    assert hooks.sums[3].item() - before == pytest.approx(squares([model[2].bias.grad]))


def test_two_optimizers_on_one_model_do_not_push_each_other_back(model):
    first, second = watch(model.parameters()), watch(model.parameters())
    handles = [*first._handles, *second._handles]
    loss(model).backward()
    assert [*first._handles, *second._handles] == handles
    assert torch.equal(first.sums, second.sums)


# -- failures ---------------------------------------------------------------------------------------------------------


class Broken(torch.autograd.Function):
    """Passes its input through; its backward fails."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("out of luck")


def fail_half_way(model):
    hidden = Broken.apply(model[0](torch.ones(1, 3, dtype=torch.float64)))
    with pytest.raises(RuntimeError, match="out of luck"):
        model[2](hidden).sum().backward()


def test_a_pass_after_a_failed_one_is_a_pass_of_its_own(model):
    hooks = watch(model.parameters())
    fail_half_way(model)
    loss(model).backward()
    assert hooks.passes == 2


def test_a_failed_pass_is_forgotten_with_its_window(model):
    hooks = watch(model.parameters())
    truth = expected_squares(model, seeds=(0,))
    fail_half_way(model)
    hooks.clear()
    loss(model).backward()
    assert hooks.passes == 1
    assert hooks.sums[:4].tolist() == pytest.approx(truth)


# -- traces -----------------------------------------------------------------------------------------------------------


def hooks_on(model):
    return [len(parameter._backward_hooks or {}) for parameter in model.parameters()]


def train_once(optimizer, model):
    loss(model).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("base", BASES)
def test_a_dropped_optimizer_is_gone_at_once_with_its_hooks(model, base):
    """Without Python's search for cycles, which may come late."""
    train_once(LENA(model.parameters(), total_steps=5, base=base), model)  # what torch imports at a first step
    gc.collect()
    gc.disable()
    try:
        optimizer = LENA(model.parameters(), total_steps=5, base=base)
        train_once(optimizer, model)
        assert hooks_on(model) == [1] * 4
        gone = weakref.ref(optimizer), weakref.ref(controller_of(optimizer))
        del optimizer
        assert [reference() for reference in gone] == [None, None]
        assert hooks_on(model) == [0] * 4
    finally:
        gc.enable()


def test_a_closed_optimizer_sees_nothing(model):
    optimizer = LENA(model.parameters(), total_steps=5)
    controller_of(optimizer).close()
    controller_of(optimizer).close()
    assert hooks_on(model) == [0] * 4
    loss(model).backward()
    with pytest.raises(StateError, match="no backward pass was seen"):
        optimizer.step()


def test_a_second_optimizer_on_the_same_parameters_sees_them_as_well(model):
    first, second = LENA(model.parameters(), total_steps=5), LENA(model.parameters(), total_steps=5)
    loss(model).backward()
    first.step()
    second.step()
    assert report(first) == report(second)


def test_a_copied_model_has_no_hooks(model):
    optimizer = LENA(model.parameters(), total_steps=5)
    twin = copy.deepcopy(model)
    assert hooks_on(twin) == [0] * 4
    loss(twin).backward()
    optimizer.step()
    assert controller_of(optimizer).schedule.updates == 0, "the pass was the copy's"


def test_a_saved_model_has_no_hooks(model):
    optimizer = LENA(model.parameters(), total_steps=5)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert hooks_on(loaded) == [0] * 4
    assert hooks_on(model) == [1] * 4
    controller_of(optimizer).close()


def test_compiled_autograd_is_refused(model):
    hooks = watch(model.parameters())
    compiler = torch.compile(backend="aot_eager")
    with torch._dynamo.compiled_autograd._enable(compiler), pytest.raises(UnsupportedError, match="compiled autograd"):
        loss(model).backward()
    torch._dynamo.reset()
    loss(model).backward()
    assert hooks.passes == 1


def test_a_compiled_model(model):
    truth = expected_squares(model, seeds=(0, 1))
    hooks = watch(model.parameters())
    compiled = torch.compile(model, backend="aot_eager")
    for seed in (0, 1):
        loss(compiled, seed).backward()
    assert hooks.passes == 2
    assert hooks.sums[:4].tolist() == pytest.approx(truth)
