"""An update reads no number from the device: it runs on the meta device, where there is none to read."""

import pytest
import torch
from torch import nn

from ds_lena import LENA
from ds_lena.layouts.layout import Segment
from ds_lena.optimizer import controller_of
from ds_lena.update.apply import Applier, Rates
from ds_lena.update.rules import Rule
from ds_lena.update.segments import cut_flat

META = torch.device("meta")


@pytest.mark.parametrize(
    "keys",
    [{"total_steps": 100}, {"total_steps": 100, "variant": "authors-code"}, {"warmup": "none", "smoothing": 0.5},
     {"total_steps": 100, "scaling": "sqrt", "max_factor": 4, "warmup": "fixed"},
     {"total_steps": 100, "base": "lamb"}, {"total_steps": 100, "base": "lars", "trust_clip": [0.1, 10]}],
    ids=str,
)  # fmt: skip
def test_measuring_and_deciding(keys):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(META)
    optimizer = LENA(model.named_parameters(), **keys)
    controller = controller_of(optimizer)
    for applied in (True, True, False):
        for _ in range(3):
            model(torch.ones(5, 3, device=META)).sum().backward()
        assert controller.begin_update(optimizer.param_groups, optimizer.state).factor.device == META
        controller.end_update(applied)
        optimizer.zero_grad()
    assert (controller.schedule.updates, controller.schedule.skipped) == (2, 1)


def test_moving():
    flat = torch.zeros(10, device=META)
    flat.grad = torch.zeros(10, device=META)
    rates = []
    rule = Rule(lambda group: ("buffer",), lambda p, g, buffers, step, lr, decay, group: rates.append(lr))
    cut = cut_flat(10, [Segment(0, 0, 6, 0), Segment(1, 6, 4, 0)], rates=[0, 1], decays=[True, True])
    groups = [{"params": [flat], "lr": 0.1, "weight_decay": 0.0}]
    Applier(rule, {flat: cut}).apply(groups, {flat: {}}, Rates(torch.ones(2, dtype=torch.float64, device=META)))
    assert [(rate.device, rate.shape, rate.dtype) for rate in rates] == [(META, (), torch.float32)] * 2


def test_rates_are_where_the_pieces_are():
    """Offload on a GPU: factors on the GPU, pieces on the CPU. Meta stands for the GPU's part, which is not read."""
    rates = Rates(torch.ones(2, dtype=torch.float64))
    assert rates.of(0.5, torch.device("cpu")) == [0.5, 0.5]
    assert [rate.device for rate in rates.of(0.5, META)] == [META, META]
    assert rates.of(0.5, META) is rates.of(0.5, META)
