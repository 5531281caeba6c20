"""The cost model's bytes and collectives are those that go over the network, at every stage."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
import torch

import ds_lena
from benchmarks.footprint import Collectives
from ds_lena.cost import Job, collective_bytes
from tests.helpers.marks import rest
from tests.integrations._engines import LENA, Net, config, engine, train, without_optimizer
from tests.integrations._ranks import WORLD, Ranks

UPDATES = range(3, 5)  # counted after the first ones, in which DeepSpeed still gets to know the model


def sizes(stage: int, layer: str | None) -> Counter[int]:
    """Bytes of the all-reduces of two updates, by LENA with this kind of layer or by torch's AdamW."""
    model = Net(depth=3)
    keys = {**LENA, "layer": layer}
    parameters = model.parameters()
    optimizer = ds_lena.LENA(parameters, **keys) if layer else torch.optim.AdamW(parameters, lr=LENA["lr"])
    with engine(without_optimizer(config(stage)), model, optimizer=optimizer) as made:
        train(made, range(UPDATES.start))
        with Collectives() as seen:
            train(made, UPDATES)
        started = zip(seen.names, seen.sizes, strict=True)
        return Counter(size for name, size in started if name == "allreduce_")


@pytest.mark.parametrize(
    ("stage", "layer"),
    rest(product(range(4), ("tensor", "model")), [(0, "tensor"), (1, "model"), (2, "tensor"), (3, "model")]),
)
def test_the_model_predicts_every_byte_that_lena_adds(ranks: Ranks, stage: int, layer: str) -> None:
    model = Net(depth=3)
    params, tensors = sum(p.numel() for p in model.parameters()), len(list(model.parameters()))
    layers = tensors if layer == "tensor" else 1
    predicted = collective_bytes(Job(params=params, ranks=WORLD, stage=stage, tensors=tensors, layers=layers))
    expected = {size: len(UPDATES) for size in predicted}
    for ours, stock in zip(ranks.run(sizes, stage, layer), ranks.run(sizes, stage, None), strict=True):
        assert not stock - ours, "LENA replaces none of them"
        assert ours - stock == expected
