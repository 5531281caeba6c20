"""The cost model's bytes and collectives are those that go over the network, at every stage."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import ds_lena
from ds_lena.cost import Job
from ds_lena.cost.model import collective_bytes
from tests.integrations._collectives import Collectives
from tests.integrations._engines import LENA, Net, config, engine, train, without_optimizer
from tests.integrations._ranks import WORLD, Ranks

UPDATES = range(3, 5)  # counted after the first ones, in which DeepSpeed still gets to know the model


class Sizes(Collectives):
    """Also the bytes of the tensors that each all-reduce is given."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == "c10d::allreduce_":
            self.sizes[sum(tensor.numel() * tensor.element_size() for tensor in args[0])] += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


def sizes(stage: int, layer: str | None) -> Counter[int]:
    """Bytes of the all-reduces of two updates, by LENA with this kind of layer or by torch's AdamW."""
    model = Net(depth=3)
    keys = {**LENA, "layer": layer}
    parameters = model.parameters()
    optimizer = ds_lena.LENA(parameters, **keys) if layer else torch.optim.AdamW(parameters, lr=LENA["lr"])
    with engine(without_optimizer(config(stage)), model, optimizer=optimizer) as made:
        train(made, range(UPDATES.start))
        with Sizes() as collectives:
            train(made, UPDATES)
        return collectives.sizes


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("layer", ["tensor", "model"])
def test_the_model_predicts_every_byte_that_lena_adds(ranks: Ranks, stage: int, layer: str) -> None:
    model = Net(depth=3)
    params, tensors = sum(p.numel() for p in model.parameters()), len(list(model.parameters()))
    layers = tensors if layer == "tensor" else 1
    predicted = collective_bytes(Job(params=params, ranks=WORLD, stage=stage, tensors=tensors, layers=layers))
    expected = {size: len(UPDATES) for size in predicted}
    for ours, stock in zip(ranks.run(sizes, stage, layer), ranks.run(sizes, stage, None), strict=True):
        assert not stock - ours, "LENA replaces none of them"
        assert ours - stock == expected
