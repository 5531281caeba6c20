"""DeepSpeed's OptimizedLinear: a frozen weight, and two small ones that are trained beside it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.integrations._engines import config, engine
from tests.integrations._ranks import Ranks
from tests.integrations._truth import KEYS, differences, every_rank, numbers

UPDATES = range(3)


class Adapted(nn.Module):
    """`model(x)` is the loss."""

    def __init__(self) -> None:
        from deepspeed.linear import LoRAConfig, OptimizedLinear

        super().__init__()
        torch.manual_seed(0)
        lora = LoRAConfig(lora_r=2, lora_alpha=4)
        self.first = OptimizedLinear(8, 8, lora_config=lora, dtype=torch.float32, device="cpu")
        self.last = nn.Linear(8, 3)
        for parameter in self.parameters():  # one of the two small weights starts as zeros
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x))).square().mean()


def adapted_run(stage: int) -> list[str]:
    rank, start = torch.distributed.get_rank(), Adapted()
    windows = [every_rank(lambda r, u=update: [(numbers(u, r, m),) for m in range(2)]) for update in UPDATES]
    with engine(config(stage, lena=KEYS), copy.deepcopy(start)) as made:
        for update in UPDATES:
            for micro in range(2):
                made.backward(made(numbers(update, rank, micro)))
                made.step()
        return differences(made, start, windows, divisor=2)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_what_is_trained_beside_a_frozen_weight_is_measured_as_the_reference_says(ranks: Ranks, stage: int) -> None:
    assert ranks.run(adapted_run, stage) == [[], []]
