"""ZeRO 1 and 2 with DeepSpeed's Muon: its update takes the place of the averaged gradient within backward."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ....grad_stats.norms import SquaredNorms, squared_norms
from ....layouts.layout import GradientPieces
from .zero12 import Zero12Layout


class Zero12MuonLayout(Zero12Layout):
    """`DeepSpeedZeroOptimizer` around Muon. Muon's update is folded in place: nothing is left of the gradient.

    So norms are taken right before. The piece of a matrix that Muon moves is one number, with the norm of the piece.
    """

    def __init__(self, zero: Any, index: Mapping[int, int]) -> None:
        super().__init__(zero, index)
        self._norms: dict[int, SquaredNorms] = {}
        self._roots: dict[int, dict[int, Tensor]] = {}
        original = zero.get_flat_partition

        @functools.wraps(original)
        def get_flat_partition(tensor_list: Any, *args: Any, param_group_idx: int, **keywords: Any) -> Any:
            if tensor_list and zero._is_muon_group(tensor_list):
                self._measure(tensor_list, param_group_idx)
            return original(tensor_list, *args, param_group_idx=param_group_idx, **keywords)

        zero.get_flat_partition = get_flat_partition

    @torch.no_grad()
    def _measure(self, tensors: list[Tensor], group: int) -> None:
        """The norms of this rank's pieces of whole averaged gradients. The last call before the step counts."""
        gradients = self._zero.all_grad_tensors[group]
        number_of = {self._index[id(tensor)]: i for i, tensor in enumerate(tensors)}
        first = gradients[0]
        if group not in self._norms:
            self._norms[group] = SquaredNorms(len(tensors), first.dtype, first.device)
        pieces = (
            (number_of[s.parameter], gradients[number_of[s.parameter]].reshape(-1).narrow(0, s.offset, s.length))
            for s in self._segments[group]
        )
        roots = squared_norms(pieces, self._norms[group]).sqrt()
        self._roots[group] = {i: roots[number].reshape(1) for i, number in number_of.items()}

    def _is_reduced(self) -> bool:
        """Of groups with a compact buffer DeepSpeed adds up in what it says is averaged."""
        zero = self._zero
        held = (group for group, pieces in zero.averaged_gradients.items() if pieces is not None)
        return not all(map(zero._use_compact_grad_partition_buffer, held))

    def gradients(self) -> GradientPieces:
        of_muon = {i: root for roots in self._roots.values() for i, root in roots.items()}
        for i, piece in super().gradients():
            yield i, piece if piece is None else of_muon.get(i, piece)
