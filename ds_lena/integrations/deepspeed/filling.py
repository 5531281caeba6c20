"""Fills tensors in an engine's own layout from the files of a checkpoint in another one, one file after the other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import StateError
from ...layers import named_parameters, without_compiled
from ...layouts.pieces import Copy, Piece, copies
from ...saved_files import Files
from ._internals import saved
from ._internals.engine import logical_shapes
from ._internals.saved import reading


class Filled:
    """Master weights and the base rule's state in the engine's layout.

    `like`: the engine's master weights. `pieces`: in each of them.
    """

    def __init__(self, like: list[Tensor], pieces: list[list[Piece]]) -> None:
        self._like = like
        self.masters = [
            torch.zeros(tensor.shape, dtype=tensor.dtype) if held else tensor.detach()
            for tensor, held in zip(like, pieces, strict=True)
        ]
        self.state: dict[int, dict[str, Any]] = {}
        self._steps: dict[int, tuple[float, str, Path]] = {}

    def take(self, path: Path, shard: saved.Shard, wanted: list[Copy], with_state: bool) -> None:
        """Copy from one file. `with_state`: the base rule's state too, not the masters alone."""
        for copy in wanted:
            _copy(copy, shard.masters[copy.source], self.masters[copy.target])
            for key, value in shard.inner["state"].get(copy.source, {}).items() if with_state else ():
                if key == "step":
                    self._take_step(path, copy, value)
                    continue
                target = self.state.setdefault(copy.target, {})
                if key not in target:
                    target[key] = torch.zeros(self._like[copy.target].shape, dtype=value.dtype)
                _copy(copy, value, target[key])

    def _take_step(self, path: Path, copy: Copy, step: Any) -> None:
        number = float(step)
        known, name, other = self._steps.setdefault(copy.target, (number, copy.name, path))
        if known != number:
            raise StateError(
                f'LENA: "{copy.name}" in {path} has had {number:g} updates, and "{name}" in {other} {known:g}. In this '
                "layout both lie in one tensor, which has one count. Load the checkpoint at ZeRO 0."
            )
        self.state.setdefault(copy.target, {})["step"] = torch.as_tensor(step).clone()


def frozen_weights(
    module: nn.Module, left_out: set[str], files: Files, model: Mapping[str, Any]
) -> list[tuple[Tensor, Tensor]]:
    """This rank's part of each frozen weight, with the saved values. `left_out`: names that are not to be loaded."""
    found: list[tuple[Tensor, Tensor]] = []
    for name, parameter in named_parameters(module):
        if name in left_out:
            continue
        first, length = saved.window_of(parameter)
        if length:
            size = logical_shapes([parameter])[0].numel()
            found.append((parameter, _frozen_weight(Piece(name, 0, length, first), size, files, model)))
    return found


def _frozen_weight(piece: Piece, size: int, files: Files, model: Mapping[str, Any]) -> Tensor:
    """The values of a piece of a frozen weight. ZeRO-3 cuts it into equal parts, of which the last are padded."""
    weights_in = saved.frozen_in if files.is_cut else saved.weights_in
    held = weights_in(model)[piece.name]
    part = max(held.numel(), 1)
    ranks = reading(files.model, lambda: saved.ranks_in(model)) if files.is_cut else 1
    parts = {
        str(files.model_of(rank)): [[Piece(piece.name, 0, min(part, size - rank * part), rank * part)]]
        for rank in range(ranks)
        if rank * part < size
    }
    values = torch.zeros(piece.length, dtype=held.dtype)
    for file, wanted in copies([[piece]], parts, {piece.name: size}).items():
        for copy in wanted:
            take = functools.partial(_take_weight, Path(file), weights_in, copy, values)
            reading(Path(file), take)
    return values


def _take_weight(
    path: Path, weights_in: Callable[[Mapping[str, Any]], dict[str, Tensor]], copy: Copy, values: Tensor
) -> None:
    _copy(copy, weights_in(saved.read_file(path))[copy.name], values)


def names_of_rest(module: nn.Module, trained: Mapping[str, Any]) -> tuple[list[str], dict[str, str]]:
    """The names of the frozen weights, and of the buffers as the module has them, by their names without wrappers."""
    frozen = [name for name, _ in named_parameters(module) if name not in trained]
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return frozen, {without_compiled(name): name for name in module.state_dict() if name not in parameters}


def _copy(copy: Copy, source: Any, target: Tensor) -> None:
    values = source.detach().reshape(-1).narrow(0, copy.begin, copy.length)
    target.view(-1).narrow(0, copy.start, copy.length).copy_(values)
