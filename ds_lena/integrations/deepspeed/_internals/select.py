"""From an engine's optimizer wrapper to its layout. Only this file knows which wrappers there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ....layouts.layout import Layout
from .bf16 import Bf16Layout
from .engine import EngineView
from .grid import experts
from .zero0 import Zero0Layout
from .zero3 import Zero3Layout
from .zero3_nvme import Zero3NvmeLayout
from .zero3_offload import Zero3OffloadLayout
from .zero12 import Zero12Layout
from .zero12_offload import Zero12OffloadLayout


def _zero12(wrapper: Any, index: Mapping[int, int]) -> Layout:
    return (Zero12OffloadLayout if wrapper.cpu_offload else Zero12Layout)(wrapper, index)


def _zero3(wrapper: Any, index: Mapping[int, int]) -> Layout:
    if wrapper.swap_optimizer:
        return Zero3NvmeLayout(wrapper, index)
    return (Zero3OffloadLayout if wrapper.offload_optimizer else Zero3Layout)(wrapper, index)


_BY_WRAPPER: dict[str, Callable[[Any, Mapping[int, int]], Layout]] = {
    "DeepSpeedZeroOptimizer": _zero12,
    "DeepSpeedZeroOptimizer_Stage3": _zero3,
    "BF16_Optimizer": Bf16Layout,
}


def layout_of(view: EngineView, index: Mapping[int, int]) -> Layout | None:
    """The layout of an engine's optimizer wrapper. None for an unknown wrapper.

    `index`: id(parameter) to its number.
    """
    wrapper = view.wrapper
    name = type(wrapper).__name__
    if name in _BY_WRAPPER:
        return _BY_WRAPPER[name](wrapper, index)
    if name == "FP16_UnfusedOptimizer":
        low, high = wrapper.fp16_groups, wrapper.fp32_groups
        masters = [pair for pairs in zip(low, high, strict=True) for pair in zip(*pairs, strict=True)]
    elif wrapper is view.optimizer:
        masters = [(p, p) for group in wrapper.param_groups for p in group["params"] if p.requires_grad]
    else:
        return None
    copies = {parameter: expert.copies for parameter, expert in experts(view.module).items()}
    return Zero0Layout(masters, index, lambda parameter: copies.get(id(parameter), view.grid.data))
