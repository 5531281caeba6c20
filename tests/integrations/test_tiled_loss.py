"""DeepSpeed's functions that work in tiles: a loss calls backward in its forward, a layer in its backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ds_lena
from tests.integrations._engines import config, engine
from tests.integrations._ranks import Ranks
from tests.integrations._truth import KEYS, differences, every_rank, numbers

UPDATES, SHARDS = range(3), 4


class Head(nn.Module):
    """`model(x)` is the loss of a body and a head without a bias, in one piece or in shards."""

    def __init__(self, tiled: bool) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(6)
            self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 5, bias=False)
        self.tiled = tiled

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        if not self.tiled:
            # What the shards add to the head's gradient is not divided by the accumulation steps.
            return self.loss(hidden) + self.loss(hidden.detach())
        from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

        labels = torch.zeros(hidden.shape[:2], dtype=torch.long)
        args = (hidden, labels, None, SHARDS, [self.head.weight], "mean")
        return TiledFusedLogitsLoss.apply(lambda model, x, _: model.loss(x), self, *args)

    def loss(self, hidden: Tensor) -> Tensor:
        return (self.head(hidden) - 1).square().mean()


class Layer(nn.Module):
    """`model(x)` is the loss of a body, a layer in one piece or in tiles, and a last layer."""

    def __init__(self, tiled: bool) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.body, self.inner, self.last = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.tiled = tiled

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x)
        if not self.tiled:
            return self.last(self.layer(hidden)).square().mean()
        from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

        weights = [self.inner.weight]
        hidden = TiledMLP.apply(lambda model, x: model.layer(x), self, hidden, SHARDS, weights)
        return self.last(hidden).square().mean()

    def layer(self, hidden: Tensor) -> Tensor:
        return torch.tanh(self.inner(hidden))


MODELS = {"loss": Head, "layer": Layer}


def batch(rank: int, update: int, micro: int) -> tuple[Tensor]:
    return (numbers(rank, update, micro, shape=(2, 4, 8)),)


def tiled_run(stage: int, what: str) -> list[str]:
    windows = [every_rank(lambda rank, u=update: [batch(rank, u, micro) for micro in range(2)]) for update in UPDATES]
    entries: dict[str, Any] = config(stage, lena=KEYS, zero={"stage3_param_persistence_threshold": 0})
    with engine(entries, MODELS[what](tiled=True)) as made:
        for update in UPDATES:
            for micro in range(2):
                made.backward(made(*batch(torch.distributed.get_rank(), update, micro)))
                made.step()
        return differences(made, MODELS[what](tiled=False), windows, divisor=2)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("what", MODELS)
def test_tiles_are_measured_and_trained_as_the_reference_without_them(ranks: Ranks, what: str, stage: int) -> None:
    assert ranks.run(tiled_run, stage, what) == [[], []]


def lost(immediate: bool) -> str:
    entries = config(1, "bf16-fp32", lena=KEYS, bf16={"enabled": True, "immediate_grad_update": immediate})
    with engine(entries, Head(tiled=True)) as made:
        before = made.module.head.weight.detach().clone()
        try:
            for micro in range(2):
                made.backward(made(numbers(micro, shape=(2, 4, 8)).bfloat16()))
                made.step()
        except ds_lena.UnsupportedError as error:
            return str(error)
        return "moved" if not torch.equal(before, made.module.head.weight) else "not moved"


def test_a_gradient_that_deepspeed_loses_is_refused(ranks: Ranks) -> None:
    assert all("a loss has called backward in its own forward" in text for text in ranks.run(lost, False))
    assert ranks.run(lost, True) == ["moved"] * 2
