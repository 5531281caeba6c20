"""From an engine's optimizer wrapper to its layout. Only this file knows which wrappers there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ....layouts.layout import Layout
from .bf16 import Bf16Layout
from .engine import EngineView
from .grid import experts
from .zero0 import Zero0Layout
from .zero3 import Zero3Layout
from .zero3_nvme import Zero3NvmeLayout
from .zero3_offload import Zero3OffloadLayout
from .zero12 import Zero12Layout
from .zero12_muon import Zero12MuonLayout
from .zero12_offload import Zero12OffloadLayout


def _zero12(wrapper: Any, index: Mapping[int, int]) -> Layout:
    if wrapper.cpu_offload:
        return Zero12OffloadLayout(wrapper, index)
    return (Zero12MuonLayout if is_muon(wrapper.optimizer) else Zero12Layout)(wrapper, index)


def _zero3(wrapper: Any, index: Mapping[int, int]) -> Layout:
    if wrapper.swap_optimizer:
        return Zero3NvmeLayout(wrapper, index)
    return (Zero3OffloadLayout if wrapper.offload_optimizer else Zero3Layout)(wrapper, index)


_BY_WRAPPER: dict[str, Callable[[Any, Mapping[int, int]], Layout]] = {
    "DeepSpeedZeroOptimizer": _zero12,
    "DeepSpeedZeroOptimizer_Stage3": _zero3,
    "BF16_Optimizer": Bf16Layout,
}


_TRAINED: dict[str, Callable[[Any], Sequence[Sequence[Tensor]]]] = {
    "DeepSpeedZeroOptimizer": lambda wrapper: wrapper.bit16_groups,
    "DeepSpeedZeroOptimizer_Stage3": lambda wrapper: wrapper.fp16_groups,
    "BF16_Optimizer": lambda wrapper: wrapper.bf16_groups,
    "FP16_UnfusedOptimizer": lambda wrapper: wrapper.fp16_groups,
    "FP16_Optimizer": lambda wrapper: wrapper.fp16_groups,
}


def trained_parameters(view: EngineView) -> list[Tensor]:
    """The model's own parameters that the optimizer of an engine trains, in the order of its groups."""
    wrapper = view.wrapper
    if wrapper is view.optimizer:
        groups: Sequence[Sequence[Tensor]] = [group["params"] for group in wrapper.param_groups]
    else:
        groups = _TRAINED.get(type(wrapper).__name__, lambda wrapper: [])(wrapper)
    return [parameter for group in groups for parameter in group if parameter.requires_grad]


def is_muon(optimizer: Any) -> bool:
    """Whether it is DeepSpeed's Muon, by DeepSpeed's own test."""
    return "muon" in type(optimizer).__name__.lower()


def gives_norms_only(layout: Layout) -> bool:
    """Whether the pieces of a layout are no gradients, but have their norms."""
    return isinstance(layout, Zero12MuonLayout)


def layout_of(view: EngineView, index: Mapping[int, int], mends: bool = True) -> Layout | None:
    """The layout of an engine's optimizer wrapper. None for an unknown wrapper.

    `index`: id(parameter) to its number. `mends`: see `Layout`.
    """
    layout = _layout_of(view, index)
    if layout is not None:
        layout.mends = mends
    return layout


def _layout_of(view: EngineView, index: Mapping[int, int]) -> Layout | None:
    wrapper = view.wrapper
    name = type(wrapper).__name__
    if name in _BY_WRAPPER:
        return _BY_WRAPPER[name](wrapper, index)
    if name == "FP16_UnfusedOptimizer":
        low, high = wrapper.fp16_groups, wrapper.fp32_groups
        masters = [pair for pairs in zip(low, high, strict=True) for pair in zip(*pairs, strict=True)]
    elif name == "FP16_Optimizer":  # around FusedAdam at ZeRO 0, with flat copies; LENA's is never in it
        masters = [(p, p) for group in wrapper.fp16_groups for p in group]
    elif wrapper is view.optimizer:
        masters = [(p, p) for group in wrapper.param_groups for p in group["params"] if p.requires_grad]
    else:
        return None
    copies = {parameter: expert.copies for parameter, expert in experts(view.module).items()}
    return Zero0Layout(masters, index, lambda parameter: copies.get(id(parameter), view.grid.data))
