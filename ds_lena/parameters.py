"""The forms in which a user may hand over parameters, and the forms that are refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigError, UnsupportedError


def read_names(params: Iterable[Any]) -> tuple[Any, dict[int, str]]:
    """torch's `params`, read once, and the names by id of the parameter.

    Raises:
        ConfigError: only some parameters have names, or two have the same name.

    What torch refuses, as one tensor alone or a set, is left for torch to refuse.
    """
    if isinstance(params, Tensor):
        return params, {}
    groups: list[Any] = []
    everything: list[Any] = []
    for entry in params:
        if isinstance(entry, dict):
            inside = entry["params"]
            inside = inside if isinstance(inside, (Tensor, set)) else list(inside)
            groups.append({**entry, "params": inside})
            everything.extend([inside] if isinstance(inside, Tensor) else inside)
        else:
            groups.append(entry)
            everything.append(entry)
    names = {id(entry[1]): entry[0] for entry in everything if isinstance(entry, tuple)}
    if names and len(names) != len(everything):
        raise ConfigError(
            f"LENA: {len(names)} of {len(everything)} parameters have names. Give names for all of them, or for none."
        )
    twice = sorted(name for name, uses in Counter(names.values()).items() if uses > 1)
    if twice:
        raise ConfigError(
            f'LENA: the name "{twice[0]}" is given to several parameters, so their layers cannot be told apart. Take '
            "the names from named_parameters() of the whole model, not of parts of it."
        )
    return groups, names


def require_supported(parameters: Sequence[Tensor], is_made_by_engine: bool = False) -> None:
    """Raise `UnsupportedError` for parameters of a form, type or device for which LENA would not be exact."""
    for parameter in parameters:
        _require_form(parameter)
        _require_type(parameter, is_made_by_engine)
    devices = sorted({str(parameter.device) for parameter in parameters})
    if len(devices) > 1:
        raise UnsupportedError(
            f"LENA: the parameters lie on {len(devices)} devices: {', '.join(devices)}. Supported is one device a "
            "process; use DeepSpeed ZeRO to spread a model."
        )


def _require_form(parameter: Tensor) -> None:
    shard = None
    if type(parameter).__name__ == "DTensor" or hasattr(parameter, "_local_tensor"):
        shard = "DTensor (FSDP2, or torch's tensor parallelism)"
    elif getattr(parameter, "_is_flat_param", False) or hasattr(parameter, "_fsdp_flattened"):
        shard = "part of a FlatParameter (FSDP)"
    if shard is not None:
        raise UnsupportedError(
            f"LENA: a parameter is a {shard}. Sharded parameters are supported under DeepSpeed ZeRO 1-3: "
            "use that, or DDP."
        )
    if any(stride == 0 and size > 1 for stride, size in zip(parameter.stride(), parameter.shape, strict=True)):
        raise UnsupportedError(
            f"LENA: a parameter of shape {tuple(parameter.shape)} is expanded: several of its elements share one place "
            "in memory, so they cannot move apart. Make the parameter from a clone(), or expand it in forward()."
        )


def _require_type(parameter: Tensor, is_made_by_engine: bool) -> None:
    """An engine scales the loss in fp16, and keeps fp32 copies of the parameters."""
    is_half = parameter.dtype == torch.float16
    if parameter.is_complex() or (is_half and not is_made_by_engine):
        how = " For fp16, name LENA in DeepSpeed's JSON, or give it the parameters in float32." if is_half else ""
        raise UnsupportedError(
            f"LENA: a parameter is of type {parameter.dtype}. Supported are bfloat16, float32 and float64.{how}"
        )
