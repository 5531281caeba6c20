"""LENA for models of Megatron-core: in Megatron's own training loop by `wrap`, or under DeepSpeed.

`watch` measures the noise scale in Megatron's own loop with any torch optimizer. Under DeepSpeed `ds_lena.watch` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from ...watching import Watch
from .partial import name_mpu_calls, sum_partial_gradients

__all__ = ["name_mpu_calls", "sum_partial_gradients", "watch", "wrap"]

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

    attach(optimizer, _as_list(model_chunks), keys)
    return optimizer


def watch(optimizer: Any, model_chunks: Sequence[nn.Module] | nn.Module, **keys: Any) -> Watch:
    """Measure the gradient noise scale of a training in Megatron-core's own loop, with any torch optimizer in it.

    watch = watch(get_megatron_optimizer(config, model_chunks), model_chunks)

    The training does not change: its weights are equal to the bit. Call it on every rank, between two updates; each
    rank calls `close()` too, if at all. A second call with the same keys returns the same watch. If `wrap` was called
    with this optimizer, the watch shows what LENA measures. Several optimizers in Megatron's, as for Muon, are refused.

    A checkpoint of Megatron's holds what your script puts there. Save `watch.state_dict()`, plain numbers that are the
    same on every rank, beside the model and the optimizer, and give it to `watch.load_state_dict()` of the run that
    goes on. Without it the averages start fresh. A LENA has them in the optimizer's own state.

    Args:
        optimizer: what `megatron.core.optimizer.get_megatron_optimizer` returned.
        model_chunks: the list that it was given, or the one in it: Megatron's DistributedDataParallel around the model.
        **keys: those of docs/noise_scale.md. Megatron's calculator of micro-batches, if the script has started it,
            says how many samples a micro-batch has.

    Returns:
        A `Watch`. `watch.report()` and `ds_lena.report(optimizer)` have the numbers, in micro-batches.

    Raises:
        UnsupportedError: something in use for which it would not be exact. The error names the flag to set.
        ConfigError: a key is not allowed, is not the same on all ranks, or contradicts Megatron's micro-batches; or the
            optimizer is watched already, with other keys.
        StateError: the weights do not lie where this version of ds_lena expects them.

    An error on one rank is raised on all of them.
    """
    from .watching import watch_optimizer

    return watch_optimizer(optimizer, _as_list(model_chunks), keys)


def _as_list(chunks: Sequence[nn.Module] | nn.Module) -> Sequence[nn.Module]:
    return [chunks] if isinstance(chunks, nn.Module) else chunks
