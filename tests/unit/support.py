"""What several unit tests need: vectors, checked keys, micro-gradients as numbers, and passes that produce them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_lena import LENA
from ds_lena.config import LenaConfig
from ds_lena.grad_stats.measurement import Measurement

Rows = Sequence[Sequence[float]]


def config(**keys: Any) -> LenaConfig:
    return LenaConfig.from_keys(keys)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def statistics(n: int, a: Sequence[float], b: Sequence[float]) -> Measurement:
    """A measurement with these A and B, one entry per layer."""
    return Measurement(scalar(n), vector(*a), vector(*b))


def measure(*layers: Rows) -> Measurement:
    """What the micro-gradients of each layer amount to: one row per micro-batch, one column per element."""
    gradients = [vector(*(x for row in rows for x in row)).view(len(rows), -1) for rows in layers]
    return Measurement(
        n=scalar(len(layers[0])),
        mean_square=torch.stack([g.square().sum(dim=1).mean() for g in gradients]),
        square_of_mean=torch.stack([g.mean(dim=0).square().sum() for g in gradients]),
    )


def weights(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    """One parameter of normal numbers per size."""
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)) for size in sizes]


def backward(parameters: Iterable[Tensor], gradients: Iterable[Tensor | None]) -> None:
    """One backward pass that adds exactly these gradients: the loss is linear in the parameters."""
    pairs = zip(parameters, gradients, strict=True)
    torch.stack([(p * g.to(p)).sum() for p, g in pairs if g is not None]).sum().backward()


def train_window(
    optimizer: LENA, parameters: Sequence[Tensor], micro_gradients: Iterable[Sequence[Tensor | None]]
) -> None:
    """One update from micro-gradients, averaged as a training loop does it: every loss divided by their number."""
    windows = list(micro_gradients)
    optimizer.zero_grad()
    for gradients in windows:
        backward(parameters, [None if gradient is None else gradient / len(windows) for gradient in gradients])
    optimizer.step()


def random_gradients(parameters: Sequence[Tensor], n: int, seed: int, mean: float = 0.3) -> list[list[Tensor]]:
    """n micro-gradients for the parameters: a common mean and normal noise."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [mean + torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters] for _ in range(n)
    ]
