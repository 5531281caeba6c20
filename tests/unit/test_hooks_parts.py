"""Losses that call backward in their own forward, on chunks: one micro-gradient in parts, measured as a whole."""

import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ds_lena import UnsupportedError
from ds_lena.grad_stats import backward as fenced
from ds_lena.grad_stats.hooks import GradientHooks

CHUNKS = 4


class Tiled(torch.autograd.Function):
    """The mean square of `head(x)`; gradients are made in forward, and the weight's are added to `.grad` there."""

    @staticmethod
    def forward(ctx, x, head, returns):
        x = x.detach().requires_grad_()
        gradient, loss = torch.zeros_like(x), 0.0
        of_weights = [torch.zeros_like(weight) for weight in head.parameters()]
        for rows in torch.arange(len(x)).chunk(CHUNKS):
            with torch.enable_grad():
                chunk = x[rows].detach().requires_grad_()
                part = head(chunk).square().sum() / (len(x) * head.out_features)
                if returns:
                    gradient[rows], *found = torch.autograd.grad(part, [chunk, *head.parameters()])
                    for total, each in zip(of_weights, found, strict=True):
                        total += each
                else:
                    part.backward()
                    gradient[rows] = chunk.grad
            loss = loss + part.detach()
        ctx.save_for_backward(gradient, *of_weights)
        ctx.returns = returns
        return loss

    @staticmethod
    def backward(ctx, upstream):
        gradient, *_ = ctx.saved_tensors
        return gradient * upstream, None, None


class Model(nn.Module):
    """`tied`: the head is used a second time, in the part of the pass that runs in backward."""

    def __init__(self, tiled, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
        self.tiled, self.tied = tiled, tied

    def forward(self, x):
        x = torch.tanh(self.body(self.head(x) if self.tied else x))
        return Tiled.apply(x, self.head, False) if self.tiled else self.head(x).square().mean()


def watch(model):
    names, parameters = zip(*model.named_parameters(), strict=True)
    return GradientHooks(parameters, names)


def batch(seed):
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def measured(model, wrap=lambda model, x: model(x)):
    hooks = watch(model)
    for seed in range(3):
        wrap(model, batch(seed)).backward()
    return hooks.passes, hooks.sums.tolist(), hooks.last_pass, [p.grad for p in model.parameters()]


@pytest.mark.parametrize("tied", [False, True])
def test_the_parts_of_a_micro_gradient_are_added_before_it_is_measured(tied):
    passes, sums, last_pass, gradients = measured(Model(tiled=True, tied=tied))
    wanted = measured(Model(tiled=False, tied=tied))
    assert (passes, last_pass) == (wanted[0], wanted[2]) == (3, [3] * 4)
    assert sums == pytest.approx(wanted[1])
    for mine, theirs in zip(gradients, wanted[3], strict=True):
        torch.testing.assert_close(mine, theirs)


def test_chunks_that_only_return_their_gradients_are_no_parts():
    model = Model(tiled=False)
    hooks = watch(model)
    Tiled.apply(model.body(batch(0)), model.head, True).backward()
    assert hooks.passes == 1
    assert hooks.last_pass == [1, 1, 0, 0]


def test_a_window_that_is_thrown_away_takes_its_parts_with_it():
    model = Model(tiled=True)
    hooks = watch(model)
    model(batch(5))
    hooks.clear()
    model(batch(0)).backward()
    wanted = Model(tiled=False)
    truth = watch(wanted)
    wanted(batch(0)).backward()
    assert (hooks.passes, hooks.sums.tolist()) == (1, pytest.approx(truth.sums.tolist()))


def test_what_comes_before_a_pass_comes_before_its_first_part():
    hooks, seen = watch(model := Model(tiled=True)), []
    hooks.before_pass = lambda: seen.append([p.grad is None for p in model.parameters()])
    for seed in range(2):
        model(batch(seed)).backward()
    assert seen == [[True] * 4, [False] * 4]


def in_reentrant_segment(model, x):
    return checkpoint(lambda x: Tiled.apply(x, model.head, False), model.body(x), use_reentrant=True)


def test_a_segment_that_is_computed_twice_adds_its_parts_twice_and_so_does_autograd():
    model = Model(tiled=True)
    hooks = watch(model)
    in_reentrant_segment(model, batch(0)).backward()
    assert hooks.passes == 1
    assert hooks.sums.tolist() == pytest.approx([p.grad.square().sum().item() for p in model.parameters()])


def test_parts_that_come_while_a_pass_runs_are_refused_by_name():
    model = Model(tiled=True)
    model.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))
    hooks = watch(model)
    with pytest.raises(UnsupportedError, match=r'the gradient of "head\.\w+" came in several parts'):
        (in_reentrant_segment(model, batch(0)) * model.scale).backward()
    assert hooks.passes == 1


def test_the_place_of_a_backward_is_found_from_another_thread_too():
    """On a GPU autograd calls the hooks in a thread of its own."""
    found = []

    def ask():
        found.append(fenced.inside_function())

    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            leaf = torch.ones(1, requires_grad=True)
            leaf.register_hook(lambda _: run())
            with torch.enable_grad():
                (leaf * 2).sum().backward()
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    def run():
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()

    Asks.apply(torch.ones(1, requires_grad=True))
    leaf = torch.ones(1, requires_grad=True)
    leaf.register_hook(lambda _: run())
    leaf.sum().backward()
    assert found == ["forward", None]
