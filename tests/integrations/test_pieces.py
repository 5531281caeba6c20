"""Where the layouts say that memory is: the pieces of a parameter on all ranks are each of its elements once."""

from __future__ import annotations

from collections import defaultdict

import pytest

from ds_lena.optimizer import controller_of
from tests.integrations._engines import Net, config, engine, train
from tests.integrations._ranks import Ranks

Pieces = list[tuple[int, int, int]]


def pieces(stage: int, precision: str) -> tuple[Pieces, list[tuple[int, int]], list[int]]:
    """(parameter, offset, length) of each piece, (parameter, size) of each gradient, and the parameters' sizes."""
    model = Net(width=5)  # of sizes that two ranks cannot share without padding
    sizes = [parameter.numel() for parameter in model.parameters()]
    with engine(config(stage, precision), model) as made:
        layout = controller_of(made.basic_optimizer).binding.layout
        found = [(s.parameter, s.offset, s.length) for _, segments in layout.segments() for s in segments]
        at_first = [i for i, _ in layout.gradients()]
        gradients: list[tuple[int, int]] = []
        made._take_model_step = lambda *_: gradients.extend((i, g.numel()) for i, g in layout.gradients())
        train(made, range(1))
        assert sorted(at_first) == sorted(i for i, _ in gradients), "a piece without gradient is None"
        return found, gradients, sizes


@pytest.mark.parametrize(("stage", "precision"), [(0, "bf16"), (1, "fp32"), (1, "bf16-fp32"), (2, "bf16"), (3, "fp32")])
def test_each_element_comes_once(ranks: Ranks, stage: int, precision: str) -> None:
    results = ranks.run(pieces, stage, precision)
    ranges, measured = defaultdict(set), defaultdict(int)
    for found, gradients, _ in results:
        for parameter, offset, length in found:
            ranges[parameter].add((offset, offset + length))
        for parameter, size in gradients:
            measured[parameter] += size
    for parameter, size in enumerate(results[0][2]):
        borders = sorted(ranges[parameter])
        assert [start for start, _ in borders] == [0, *(end for _, end in borders[:-1])]
        assert borders[-1][1] == measured[parameter] == size
