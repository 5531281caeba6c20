"""An experiment: LENA's statistics from gradients as Adam scales them, g / (sqrt(v) + eps).

AdaptDL's `AdamGradientNoiseScale` (https://github.com/petuum/adaptdl) does so, after five updates. In one process only:
under ZeRO no rank has v of a whole tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import ds_lena
from ds_lena.binding import Binding
from ds_lena.layouts.layout import GradientPieces
from ds_lena.layouts.plain import PlainLayout
from ds_lena.optimizer import controller_of

_RAW_UPDATES = 5


class Preconditioner:
    """Divides a gradient by the root of its bias-corrected second moment, after five updates.

    `step` and `exp_avg_sq` are LENA's own state of the parameter.
    """

    def __init__(self, lena: ds_lena.LENA, parameters: Sequence[Tensor], beta2: float, eps: float) -> None:
        self._lena, self._parameters = lena, parameters
        self._beta2, self._eps = beta2, eps
        self._scales: dict[int, tuple[float, Tensor]] = {}

    @torch.no_grad()
    def scale(self, index: int, gradient: Tensor) -> Tensor:
        """The gradient of parameter `index`, scaled."""
        state = self._lena.state.get(self._parameters[index])
        step = float(state["step"]) if state else 0
        if step < _RAW_UPDATES:
            return gradient
        if self._scales.get(index, (0.0,))[0] != step:
            second = state["exp_avg_sq"] / (1 - self._beta2**step)
            self._scales[index] = step, 1 / (second.sqrt() + self._eps)
        return gradient * self._scales[index][1]


class PreconditionedLayout(PlainLayout):
    """Plain PyTorch, with the averaged gradient scaled before its norm is taken."""

    def __init__(self, parameters: Sequence[Tensor], preconditioner: Preconditioner) -> None:
        super().__init__(parameters, rank=0, ranks=1)
        self._preconditioner = preconditioner

    def gradients(self) -> GradientPieces:
        return ((index, self._preconditioner.scale(index, gradient)) for index, gradient in super().gradients())


def precondition(lena: ds_lena.LENA, beta2: float, eps: float = 1e-8) -> None:
    """Scale every gradient, local and averaged, before its norm is taken. Before the first update."""
    controller = controller_of(lena)
    preconditioner = Preconditioner(lena, controller.parameters, beta2, eps)

    def amend(binding: Binding) -> Binding:
        joins = [partial(preconditioner.scale, index) for index in range(len(binding.placements))]
        placements = [replace(each, join=join) for each, join in zip(binding.placements, joins, strict=True)]
        return replace(
            binding, placements=placements, layout=PreconditionedLayout(controller.parameters, preconditioner)
        )

    controller.meter.amend_plain_binding(amend)
