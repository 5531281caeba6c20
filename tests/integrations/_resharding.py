"""A model with all that a checkpoint can hold, and what it holds, put together from all ranks. Nothing here asserts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_lena.optimizer import controller_of
from tests.integrations._engines import Net, config

MICROS, SAVED_AFTER, MORE = 4, 3, 3  # micro-batches of all ranks in an update; updates


class Model(nn.Module):
    """Two towers, of which one begins with frozen weights, a weight that both share, and a buffer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.net = Net(seed, width=7)  # so that the ranks' parts have padding
        self.net.right[0].weight.requires_grad_(False)
        self.net.right[2].weight = self.net.left[2].weight
        self.register_buffer("seen", torch.tensor(float(seed)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
        return self.net(x, y)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weights; biases with another learning rate and decay; three elements, of which some of four ranks get none."""
    named = dict(model.named_parameters())
    few = named.pop("net.right.4.bias")
    return [
        {"params": [p for name, p in named.items() if "bias" not in name]},
        {"params": [p for name, p in named.items() if "bias" in name], "lr": 3e-2, "weight_decay": 0.1},
        {"params": [few], "lr": 2e-2},
    ]


def train(engine: Any, updates: range) -> None:
    """The same micro-batches for any number of ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for update in updates:
        for micro in range(MICROS // world):
            generator = torch.Generator().manual_seed(100 * update + micro * world + rank)
            x, y = torch.randn(2, 2, 4, generator=generator).unbind()
            engine.backward(engine(x, y))
            engine.step()


def whole(engine: Any) -> dict[str, Tensor]:
    """Masters and state of every parameter, put together from all ranks, the model's own weights, and its buffer."""
    lena = engine.basic_optimizer
    binding = controller_of(lena).binding
    mine: list[tuple[str, int, Tensor]] = []
    for flat, segments in binding.layout.segments():
        for segment in segments:
            name = binding.placements[segment.parameter].name
            for key, value in {"master": flat, **lena.state[flat]}.items():
                piece = value.reshape(-1)[segment.start : segment.start + segment.length] if key != "step" else value
                mine.append((f"{name} {key}", segment.offset, piece.detach().reshape(-1).clone()))
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    is_copy = engine.zero_optimization_stage() == 0
    parts: dict[str, dict[int, Tensor]] = {}
    for key, offset, piece in (entry for rank in (gathered[:1] if is_copy else gathered) for entry in rank):
        parts.setdefault(key, {})[0 if key.endswith(" step") else offset] = piece
    found = {key: torch.cat([piece for _, piece in sorted(held.items())]) for key, held in parts.items()}
    import deepspeed

    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            found[name] = parameter.detach().clone().reshape(-1)
    return found | {"seen": engine.module.seen.clone()}


def entries(stage: int, precision: str, base: str, zero: dict[str, Any]) -> dict[str, Any]:
    made = config(stage, precision, {"base": base}, zero=zero)
    return made | {"gradient_accumulation_steps": MICROS // dist.get_world_size()}


def differing(a: Mapping[str, Tensor], b: Mapping[str, Tensor], rounding: float = 0.0) -> list[str]:
    assert a.keys() == b.keys()
    same = {key: torch.allclose(a[key].float(), b[key].float(), rtol=rounding, atol=rounding * 1e-2) for key in a}
    return [key for key, is_same in same.items() if not is_same]
