"""Updates without a model: the backward pass adds ready-made gradients to `p.grad`, and LENA's hooks see them.

LENA runs as an engine runs it: hooks in the backward pass; then `begin_update`, which takes the norms of the averaged
gradient and computes the factors; then `step`, which moves the parameters. In plain PyTorch, where nobody says which
pass is the last, it takes those norms at the end of every backward pass instead; that can be measured too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

import ds_lena
from benchmarks.roster import make
from benchmarks.timing import Lap, Samples, Update
from ds_lena.norms import squared_norms
from ds_lena.probe import Probe
from ds_lena.shards import Segment

PLAIN = ", plain PyTorch"
"""Behind the name of a LENA that is to run as in plain PyTorch."""


class LikeAnEngine:
    """Asks of LENA what a DeepSpeed engine asks, on one rank and on whole tensors (see `ds_lena.shards.Host`)."""

    group = None

    def __init__(self, lena: ds_lena.LENA) -> None:
        self._lena = lena
        lena.adopt(self, lena.parameter_names, range(len(lena.parameters)))

    def segments(self) -> list[tuple[Tensor, list[Segment]]]:
        return [(p, [Segment(i, 0, p.numel(), 0)]) for i, p in enumerate(self._lena.parameters)]

    def squares_of_mean(self) -> Tensor:
        return squared_norms(((i, gradient) for i, gradient in self.gradients() if gradient is not None), self._norms)

    def gradients(self) -> Iterator[tuple[int, Tensor | None]]:
        return ((i, p.grad) for i, p in enumerate(self._lena.parameters))

    def clip_coefficient(self, norm: Tensor) -> None:
        return None

    def shape(self, parameter: int) -> torch.Size:
        return self._lena.parameters[parameter].shape

    def micro_batch_size(self) -> int | None:
        return None

    def planned_n(self) -> int | None:
        return None

    def total_steps(self) -> int | None:
        return None

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
