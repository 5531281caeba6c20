"""LENA for models of Megatron-core: in Megatron's own training loop by `wrap`, or under DeepSpeed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from .partial import name_mpu_calls, sum_partial_gradients

__all__ = ["name_mpu_calls", "sum_partial_gradients", "wrap"]

T = TypeVar("T")


def wrap(optimizer: T, model_chunks: Sequence[nn.Module] | nn.Module, **keys: Any) -> T:
    """Have LENA run the updates of Megatron-core's own optimizer. Returns the same optimizer, changed in place.

    optimizer = wrap(get_megatron_optimizer(config, model_chunks), model_chunks, total_steps=…)

    Call it once, on every rank, before the first backward pass. The training loop stays as it is. LENA's state is in
    the optimizer's `state_dict()`, and in Megatron's distributed checkpoints.

    Args:
        optimizer: what `megatron.core.optimizer.get_megatron_optimizer` returned.
        model_chunks: the list that it was given, or the one in it: Megatron's DistributedDataParallel around the model.
        **keys: those of docs/keys.md. `lr`, `betas`, `eps`, `weight_decay` and `momentum` are Megatron's: they are
            taken from its OptimizerConfig, and its scheduler changes them. `base` is "adamw" (default) or "lamb" with
            `optimizer="adam"`, and "sgd" (default) or "lars" with `optimizer="sgd"`.

    Raises:
        UnsupportedError: something in use for which LENA would not be exact. The error names the flag to set.
        ConfigError: a key is not allowed, contradicts Megatron's configuration, or `total_steps` is missing.

    An error on one rank is raised on all of them.
    """
    from .attach import attach

    attach(optimizer, [model_chunks] if isinstance(model_chunks, nn.Module) else model_chunks, keys)
    return optimizer
