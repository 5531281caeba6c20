"""An experiment: LENA's statistics from gradients as Adam scales them, g / (sqrt(v) + eps).

AdaptDL's `AdamGradientNoiseScale` (https://github.com/petuum/adaptdl) does so, after five updates. In one process only:
under ZeRO no rank has v of a whole tensor. It reaches into LENA for the place where norms are taken, which nothing
outside of an experiment should do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import ds_lena

_RAW_UPDATES = 5


def precondition(lena: ds_lena.LENA, beta2: float, eps: float = 1e-8) -> None:
    """Scale every gradient by the bias-corrected second moment before its norm is taken, after five updates."""
    scales: dict[int, tuple[float, Tensor]] = {}

    def scaled(index: int, gradient: Tensor) -> Tensor:
        state = lena.state.get(lena.parameters[index])
        step = float(state["step"]) if state else 0
        if step < _RAW_UPDATES:
            return gradient
        if scales.get(index, (0.0,))[0] != step:
            second = state["exp_avg_sq"] / (1 - beta2**step)
            scales[index] = step, 1 / (second.sqrt() + eps)
        return gradient * scales[index][1]

    for norms in (lena._probe._norms, lena._host._norms):
        norms.write = _scaled_first(norms.write, scaled)


def _scaled_first(
    write: Callable[[int, Tensor], None], scaled: Callable[[int, Tensor], Tensor]
) -> Callable[[int, Tensor], None]:
    @torch.no_grad()
    def wrapped(index: int, gradient: Tensor) -> None:
        write(index, scaled(index, gradient))

    return wrapped
