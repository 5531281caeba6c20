"""Tensor parallelism: a rank holds a part of some tensors, and a copy of the others. Only one of the copies counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, zip_longest

import torch
from torch import Tensor

from ....errors import ConfigError, StateError, UnsupportedError
from ....grad_stats.placement import Placement
from ....grad_stats.reduce import sum_over
from ...megatron.partial import ADDS_UP, gradients_are_partial
from .._internals.grid import Grid, is_part, partition_dim
from ..exchange import from_all, from_some

TOLERANCE = 1e-3
"""Between the squared norms of a gradient on the ranks that hold copies of one tensor, relative."""


def amend(grid: Grid, parameters: Sequence[Tensor], placements: Sequence[Placement]) -> list[Placement]:
    """As `parts_and_copies`, for an engine: it refuses a gradient that DeepSpeed leaves in parts."""
    amended = parts_and_copies(grid, parameters, placements)
    if grid.tensor_ranks > 1:
        for parameter, placement in zip(parameters, placements, strict=True):
            if gradients_are_partial(placement.name, parameter):
                raise UnsupportedError(
                    f'LENA: each tensor-parallel rank has only a part of the gradient of "{placement.name}" '
                    f"(sequence_parallel, or qk_layernorm), and DeepSpeed does not add the parts up. {ADDS_UP}"
                )
    return amended


def parts_and_copies(grid: Grid, parameters: Sequence[Tensor], placements: Sequence[Placement]) -> list[Placement]:
    """Give parts the shape of the whole tensor, and have the first tensor-parallel rank count for the copies.

    Raises:
        ConfigError: the tensor-parallel ranks have parameters of other names.
    """
    if grid.tensor_ranks == 1:
        return list(placements)
    of_ranks = from_some(grid.everything, grid.tensor, [(each.name, tuple(each.shape)) for each in placements])
    _require_same_names([[name for name, _ in rank] for rank in of_ranks])
    shapes = [[shape for _, shape in rank] for rank in of_ranks]
    amended = []
    for i, (parameter, placement) in enumerate(zip(parameters, placements, strict=True)):
        if is_part(parameter):
            shape = _whole([rank[i] for rank in shapes], partition_dim(parameter))
            amended.append(replace(placement, shape=shape))
        else:
            amended.append(replace(placement, counted=grid.tensor_rank == 0))
    return amended


def _require_same_names(of_ranks: Sequence[Sequence[str]]) -> None:
    for rank, names in enumerate(of_ranks):
        for number, (first, other) in enumerate(zip_longest(of_ranks[0], names)):
            if first != other:
                raise ConfigError(
                    f"LENA: the tensor-parallel ranks have other parameters. Parameter {number} of the optimizer is "
                    f"{_quoted(first)} on tensor-parallel rank 0, and {_quoted(other)} on rank {rank}. Build the same "
                    "modules on all of them, freeze the same parameters, and give them in the same order."
                )


def _quoted(name: str | None) -> str:
    return "none" if name is None else f'"{name}"'


def _whole(shapes: Sequence[Sequence[int]], dim: int | None) -> torch.Size:
    """The shape of a tensor whose parts have these shapes. Where nothing says how it is cut, its size is right."""
    if dim is None:
        dim = next((d for d, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1), 0)
    whole = list(shapes[0])
    whole[dim] = sum(shape[dim] for shape in shapes)
    return torch.Size(whole)


def copies_check(
    grid: Grid, parameters: Sequence[Tensor], placements: Sequence[Placement], what_to_do: str = ADDS_UP
) -> Callable[[Tensor], None] | None:
    """What raises `StateError` if copies of one tensor have different averaged gradients, for the first update.

    It gets this rank's squares of the averaged gradient (P,), and makes one all-reduce. The stages of a pipeline hold
    other copies, so that all ranks tell each other the names, once.
    """
    if grid.tensor_ranks == 1:
        return None
    copies = [i for i, parameter in enumerate(parameters) if not is_part(parameter)]
    own = [placements[i].name for i in copies]
    names = list(dict.fromkeys(chain(*from_all(grid.everything, own)))) if grid.pipe_ranks > 1 else own
    places = [names.index(name) for name in own]

    def check(squares: Tensor) -> None:
        of_ranks = squares.new_zeros(grid.tensor_ranks, len(names))
        of_ranks[grid.tensor_rank, places] = squares[copies]
        sum_over(of_ranks, grid.everything)
        low, high = of_ranks.amin(0), of_ranks.amax(0)
        differ = (high - low > TOLERANCE * high).nonzero().flatten().tolist()
        if differ:
            raise StateError(
                f'LENA: the gradient of "{names[differ[0]]}" is not the same on all tensor-parallel '
                f"ranks, which hold copies of it: their copies drift apart, with any optimizer. Its squared norms are "
                f"{_shown(of_ranks[:, differ[0]])}. Give these ranks the same data and the same first weights. If each "
                f"has only a part of the gradient: {what_to_do} If it is no copy but a part of a tensor, set "
                "tensor_model_parallel = True on the parameter."
            )

    return check


def _shown(squares: Tensor) -> str:
    return ", ".join(f"{square:.6g}" for square in squares.tolist())
