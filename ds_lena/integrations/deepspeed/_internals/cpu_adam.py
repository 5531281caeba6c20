"""DeepSpeed's AdamW for the CPU, on one piece after the other: faster than torch's, where pieces are many."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Sequence
from ctypes import c_float
from typing import Any

import torch
from torch import Tensor

from ....update.rules import adamw
from ....update.rules.common import Group

logger = logging.getLogger("ds_lena")
_numbers = itertools.count(1 << 20)  # DeepSpeedCPUAdam counts from 0


def adamw_on_cpu() -> Callable[..., None]:
    """`move` of the base rule adamw. DeepSpeed compiles its kernel at the first use, which takes minutes.

    torch's kernel is used where that fails, or where DeepSpeed's own switch `DS_BUILD_CPU_ADAM=0` forbids it.
    """
    if os.environ.get("DS_BUILD_CPU_ADAM") == "0":
        return adamw.move
    from deepspeed.accelerator import get_accelerator

    try:
        kernel = get_accelerator().create_op_builder("CPUAdamBuilder").load()
    except Exception as error:  # of the compiler, of ninja, of another version of CUDA
        logger.warning(
            "LENA: DeepSpeed's AdamW for the CPU cannot be compiled. LENA uses torch's, which is a little "
            "slower. `ds_report` says what is missing. The error was: %s",
            error,
        )
        return adamw.move
    return CpuAdam(kernel).move


class CpuAdam:
    """DeepSpeed's kernel: csrc/adam/cpu_adam_impl.cpp.

    The kernel has its numbers in float32. With a beta2 near 1 its bias correction is off by up to a percent, so it is
    done here, in float64, for the betas that the kernel has.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel, self._number = kernel, next(_numbers)
        kernel.create_adam(self._number, 1e-3, 0.9, 0.999, 1e-8, 0.0, True, False)

    def move(
        self,
        parameters: list[Tensor],
        gradients: list[Tensor],
        buffers: Sequence[list[Tensor]],
        step: Tensor,
        lr: float | Tensor,
        weight_decay: float,
        group: Group,
    ) -> None:
        """See `update.rules.common.Rule`."""
        if not all(tensor.is_cpu and tensor.dtype == torch.float32 for tensor in (*parameters, *gradients)):
            return adamw.move(parameters, gradients, buffers, step, lr, weight_decay, group)
        count, rate = float(step), float(lr)
        beta1, beta2 = (c_float(beta).value for beta in group["betas"])
        root = (1 - beta2**count) ** 0.5
        to_step = root / (1 - beta1**count)
        for piece in zip(parameters, gradients, *buffers, strict=True):
            self._kernel.adam_update(
                self._number,
                1,  # of no use without its bias correction
                rate * to_step,
                beta1,
                beta2,
                group["eps"] * root,
                weight_decay / to_step,
                False,
                *piece,
            )
