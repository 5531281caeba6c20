"""Whether the ranks of plain PyTorch train one model and average its gradients. Asked once, at the first update."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import StateError
from .reduce import Group, extremes_over

TOLERANCE = 1e-3
"""Between the ranks' traces of one gradient, relative to its norm. An averaged gradient is the same on all ranks."""

ROUNDING = 1.1
"""B is at most A. In bfloat16, sums of many micro-gradients are rounded; this leaves room for it."""

_WHAT_TO_DO = (
    "LENA takes the gradient as it is at the end of backward(), averaged over its ranks. Wrap the model in "
    "DistributedDataParallel, and let it average in the last backward() of an update. If other ranks train "
    "something else, or nothing, give the ranks of this model as process_group (one rank alone: "
    "torch.distributed.new_group([rank]), which every rank has to call)."
)
_OTHER_PARAMETERS = (
    "LENA: the parameters or keys that LENA got are not the same on every rank: the number, names, order or shapes of "
    "the parameters differ, or the keys, or which parameters are left out. "
    "Under ZeroRedundancyOptimizer they do: use DeepSpeed ZeRO 1 instead. "
) + _WHAT_TO_DO
_NOT_AVERAGED = (
    "LENA: at the end of backward() the gradients are not the same on every rank, so they are not averaged. They may "
    "be averaged later, by hand, or the ranks train apart for some steps (no_sync(), LocalSGD), or hold other parts of "
    "the model (ZeroRedundancyOptimizer). "
) + _WHAT_TO_DO
_LARGER_THAN_AN_AVERAGE = (
    "LENA: the gradient at the end of backward() is larger than any average of the micro-gradients, so the ranks' "
    "gradients were added up and not averaged, as by a communication hook without a division, or were scaled. "
) + _WHAT_TO_DO
_MISSING = "LENA: at the first step() not every rank of LENA's process group took part. " + _WHAT_TO_DO
_LATE = (
    "LENA: waiting at the first step() for the other ranks of LENA's process group. If they never call step(): "
) + _WHAT_TO_DO


def trace_of(gradients: Iterable[Tensor], device: torch.device) -> Tensor:
    """(2,) float64: the norm of all gradients, and a sum of their elements that weighs each place differently.

    Micro-gradients may differ and have the same norm. Their weighted sums differ then.
    """
    square, total = torch.zeros((2,), dtype=torch.float64, device=device)
    for gradient in gradients:
        places = torch.linspace(1, 2, gradient.numel(), dtype=gradient.dtype, device=device)
        square = square + torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
        total = total + (gradient.reshape(-1) * places).sum(dtype=torch.float64)
    return torch.stack((square.sqrt(), total))


def require_agreement(told: object, trace: Tensor, group: Group | None) -> None:
    """Raise `StateError` if the ranks of `group` hold other parameters, or gradients that are not averaged.

    The error is the same on every rank. `told`: names, shapes and keys, whose `repr` is compared.
    `trace` (2,) float64: that of all gradients at the end of backward.
    It makes one all-reduce of six numbers and waits for them.
    """
    fingerprint = torch.full_like(trace[:1], _fingerprint(told))
    values = torch.cat((fingerprint, torch.where(trace.isfinite().all(), trace, -1.0)))
    try:
        lowest, highest = extremes_over(values, group, _LATE)
    except RuntimeError as error:  # the backend's: a rank is gone, or did not come in time
        raise StateError(_MISSING) from error
    if lowest[0] != highest[0]:
        raise StateError(_OTHER_PARAMETERS)
    if max(highest[1] - lowest[1], highest[2] - lowest[2]) > TOLERANCE * abs(highest[1]):
        raise StateError(_NOT_AVERAGED)


def require_average(mean_square: Tensor, square_of_mean: Tensor) -> None:
    """Raise `StateError` if B () is larger than A (), which no average of the micro-gradients can be.

    It waits for both. They are sums over all layers and the same on every rank, so the error is, too.
    """
    if bool(square_of_mean > ROUNDING * mean_square):
        raise StateError(_LARGER_THAN_AN_AVERAGE)


def _fingerprint(told: object) -> int:
    """48 bits, so that a float64 holds them."""
    return int.from_bytes(hashlib.sha256(repr(told).encode()).digest()[:6], "big")
