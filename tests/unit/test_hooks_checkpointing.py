"""Activation checkpointing: what the hooks see is what it sees without, or it refuses by name."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ds_lena import UnsupportedError
from ds_lena.grad_stats.hooks import GradientHooks


class Model(nn.Module):
    """Embedding, two blocks that may be checkpointed, and a head; optionally one weight used in both blocks."""

    def __init__(self, kind="none", shared=False, head_inside=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.mix = nn.Linear(4, 4, bias=False) if shared else nn.Identity()
        self.head = nn.Linear(4, 2)
        self.kind, self.head_inside = kind, head_inside
        self.double()

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = self.segment(lambda y, block=block: torch.tanh(self.mix(block(y))), x)
        return self.segment(self.head, x) if self.head_inside else self.head(x)

    def segment(self, function, x):
        if self.kind == "none":
            return function(x)
        return checkpoint(function, x, use_reentrant=self.kind == "reentrant")


def watch(model, excluded=()):
    """Hooks on all parameters; the excluded ones are only watched."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    hooks = GradientHooks(parameters, names)
    hooks.watch([name not in excluded for name in names])
    return hooks


def train(passes=3, excluded=(), **options):
    """A hooks that has watched some backward passes."""
    model = Model(**options)
    hooks = watch(model, excluded)
    for seed in range(passes):
        tokens = torch.randint(7, (5,), generator=torch.Generator().manual_seed(seed))
        model(tokens).square().sum().backward()
    return hooks


@pytest.mark.parametrize("shared", [False, True], ids=["", "shared weight"])
@pytest.mark.parametrize("head_inside", [False, True], ids=["", "head inside"])
def test_non_reentrant_checkpointing_changes_nothing(head_inside, shared):
    hooks = train(kind="non-reentrant", shared=shared, head_inside=head_inside)
    truth = train(shared=shared)
    assert hooks.passes == truth.passes == 3
    torch.testing.assert_close(hooks.sums, truth.sums)


def test_reentrant_checkpointing_between_an_embedding_and_a_head_changes_nothing():
    hooks, truth = train(kind="reentrant"), train()
    assert hooks.passes == truth.passes == 3
    assert hooks.last_pass == truth.last_pass
    torch.testing.assert_close(hooks.sums, truth.sums)


def test_callers_are_told_of_a_reentrant_pass_once():
    model, events = Model("reentrant"), []
    hooks = watch(model)
    hooks.before_pass = lambda: events.append("before")
    hooks.after_pass = lambda: events.append(f"after {sum(p.grad is not None for p in hooks.parameters)} gradients")
    model(torch.arange(5)).sum().backward()
    assert events == ["before", "after 7 gradients"]


def test_a_weight_shared_by_reentrant_segments_is_refused_by_name():
    with pytest.raises(UnsupportedError, match=r'"mix\.weight" came in several parts.*use_reentrant=False'):
        train(kind="reentrant", shared=True)


def test_a_shared_weight_that_is_excluded_is_not_refused():
    hooks = train(kind="reentrant", shared=True, excluded=["mix.weight"])
    truth = train(shared=True, excluded=["mix.weight"])
    assert hooks.passes == truth.passes == 3
    torch.testing.assert_close(hooks.sums, truth.sums)


def test_a_model_inside_of_reentrant_segments_as_a_whole_is_refused():
    with pytest.raises(UnsupportedError, match=r'"head\.\w+", came from within reentrant.*use_reentrant=False'):
        train(kind="reentrant", head_inside=True)


def test_a_refused_pass_does_not_spoil_the_next_one():
    model = Model("reentrant", head_inside=True)
    hooks = watch(model)
    with pytest.raises(UnsupportedError):
        model(torch.arange(5)).sum().backward()
    hooks.clear()
    model.kind = "none"
    model(torch.arange(5)).sum().backward()
    assert hooks.passes == 1
