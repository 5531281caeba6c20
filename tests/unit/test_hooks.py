"""The hooks see every micro-gradient once, count the backward passes, and leave no trace. Checkpointing is apart."""

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn

from ds_lena import LENA, StateError, report
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
    assert (hooks.passes, hooks.sums.tolist(), hooks.unreached()) == (0, [0], [0])
    backward(parameters, [torch.ones(2)])
    assert hooks.passes == 1
    assert hooks.sums.tolist() == pytest.approx([2])


def test_parameters_that_no_pass_has_reached_are_known():
    parameters = weights(2, 2, 2)
    hooks = watch(parameters)
    backward(parameters, [torch.ones(2), None, None])
    backward(parameters, [torch.ones(2), None, torch.ones(2)])
    assert hooks.unreached() == [1]
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
    assert hooks.unreached() == [0, 1, 3]


def test_a_pass_that_reaches_no_watched_parameter_is_not_counted(model):
    hooks = watch(model[0].parameters())
    model[2](torch.ones(1, 4, dtype=torch.float64)).sum().backward()
    assert hooks.passes == 0


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


def test_a_compiled_model(model):
    truth = expected_squares(model, seeds=(0, 1))
    hooks = watch(model.parameters())
    compiled = torch.compile(model, backend="aot_eager")
    for seed in (0, 1):
        loss(compiled, seed).backward()
    assert hooks.passes == 2
    assert hooks.sums[:4].tolist() == pytest.approx(truth)
