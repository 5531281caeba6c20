"""What one update measured, by layer: all that the decision learns of gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Measurement:
    """What one update measured, without loss scale and before any clipping.

    `n` (): micro-batches averaged in the update. `mean_square` A (L,), `square_of_mean` B (L,).
    `micro_gradients` (L,): those averaged in each layer, the fewest of its parameters. None if it is n in every layer.
    """

    n: Tensor
    mean_square: Tensor
    square_of_mean: Tensor
    micro_gradients: Tensor | None = None

    @property
    def finite(self) -> Tensor:
        """(L,) bool: both statistics are finite."""
        return torch.isfinite(self.mean_square) & torch.isfinite(self.square_of_mean)

    @property
    def seen(self) -> Tensor:
        """(L,) bool: the layer had a gradient in this update, and its statistics are finite."""
        return self.finite & (self.mean_square > 0)

    @property
    def has_noise(self) -> Tensor:
        """(L,) bool: the layer was seen in more than one micro-gradient, so its noise can be told from its signal."""
        return self.seen & ((self.n if self.micro_gradients is None else self.micro_gradients) > 1)
