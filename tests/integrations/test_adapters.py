"""Low-rank adapters: a frozen weight, and two small ones that are trained beside it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.integrations._engines import config, engine
from tests.integrations._ranks import Ranks
from tests.integrations._truth import KEYS, differences, every_rank, numbers

UPDATES = range(4)


class PeftLinear(nn.Module):
    """As PEFT's `lora.Linear`, with its names: B starts as zeros, so the first gradient of A is exactly zero."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(8, 8).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 8, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 2.0 * self.lora_B["default"](self.lora_A["default"](x))


class Adapted(nn.Module):
    """`model(x)` is the loss."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first, self.last = first, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x))).square().mean()


def adapted(how: str) -> nn.Module:
    torch.manual_seed(0)
    if how == "PEFT":
        return Adapted(PeftLinear())
    from deepspeed.linear import LoRAConfig, OptimizedLinear

    lora = LoRAConfig(lora_r=2, lora_alpha=4)
    model = Adapted(OptimizedLinear(8, 8, lora_config=lora, dtype=torch.float32, device="cpu"))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def adapted_run(how: str, stage: int) -> list[str]:
    rank, start = torch.distributed.get_rank(), adapted(how)
    windows = [every_rank(lambda r, u=update: [(numbers(u, r, m),) for m in range(2)]) for update in UPDATES]
    with engine(config(stage, lena=KEYS), copy.deepcopy(start)) as made:
        for update in UPDATES:
            for micro in range(2):
                made.backward(made(numbers(update, rank, micro)))
                made.step()
        return differences(made, start, windows, divisor=2)


@pytest.mark.parametrize(
    ("how", "stage"), [("OptimizedLinear", 0), ("OptimizedLinear", 1), ("OptimizedLinear", 2), ("PEFT", 2), ("PEFT", 3)]
)
def test_what_is_trained_beside_a_frozen_weight_is_measured_as_the_reference_says(
    ranks: Ranks, how: str, stage: int
) -> None:
    assert ranks.run(adapted_run, how, stage) == [[], []]
