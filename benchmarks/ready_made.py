"""Updates without a model: the backward pass adds ready-made gradients to `p.grad`, and LENA's hooks see them.

LENA runs as an engine runs it: hooks in the backward pass; then `begin_update`, which takes the norms of the averaged
gradient and computes the factors; then `step`, which moves the parameters. In plain PyTorch, where nobody says which
pass is the last, it takes those norms at the end of every backward pass instead; that can be measured too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import ds_lena
from benchmarks.roster import make
from benchmarks.timing import Lap, Samples, Update
from ds_lena.norms import squared_norms
from ds_lena.plain import PlainHost
from ds_lena.probe import Probe

PLAIN = ", plain PyTorch"
"""Behind the name of a LENA that is to run as in plain PyTorch."""


class LikeAnEngine(PlainHost):
    """Asks of LENA what a DeepSpeed engine asks, on one rank and on whole tensors: norms of the average at its step."""

    def __init__(self, lena: ds_lena.LENA) -> None:
        super().__init__(lena._probe, before_window=lambda: None, group=None, given=True)
        lena.adopt(self, lena.parameter_names, range(len(lena.parameters)))

    def squares_of_mean(self) -> Tensor:
        return squared_norms(self.gradients(), self._norms)

    def watch_passes(self, probe: Probe) -> None:
        self._norms = probe.new_norms()


def stepping(optimizer: torch.optim.Optimizer, plain: bool = False) -> Callable[[Lap], None]:
    """A function that steps, in the phase "step", or for LENA, unless `plain`, in the phases "measure" and "move"."""

    def step(lap: Lap) -> None:
        optimizer.step()
        lap("step")

    if plain or not isinstance(optimizer, ds_lena.LENA):
        return step
    LikeAnEngine(optimizer)
    lena = optimizer

    def engine_step(lap: Lap) -> None:
        lena.begin_update()
        lap("measure")
        lena.step()
        lena.end_update(applied=True)
        lap("move")

    return engine_step


def with_steps(samples: Samples) -> Samples:
    """The same, with the phase "step" for everyone: the sum of "measure" and "move"."""
    return {
        name: phases
        if "step" in phases
        else {**phases, "step": [a + b for a, b in zip(phases["measure"], phases["move"], strict=True)]}
        for name, phases in samples.items()
    }


def contestant(name: str, weights: Sequence[Tensor], gradients: Sequence[Tensor], passes: int = 1) -> Update:
    """The update of an optimizer of its own in the memory of `weights` and of their `.grad` (both modified in place).

    `gradients`: what each of the `passes` backward passes adds.
    """
    parameters = [nn.Parameter(weight.detach()) for weight in weights]
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.grad = weight.grad
    step = stepping(make(name.removesuffix(PLAIN), parameters), plain=name.endswith(PLAIN))

    def update(lap: Lap) -> None:
        for _ in range(passes):
            torch.autograd.backward(parameters, gradients)
        lap("backward")
        step(lap)

    return update
