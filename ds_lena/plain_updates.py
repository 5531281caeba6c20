"""Updates in plain PyTorch: where they begin and end, and a watch of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import UnsupportedError
from .layers import named_parameters
from .meter import Meter
from .parameters import require_supported
from .watch_config import WatchConfig
from .watching import Watch, Watcher

Optimizers = Sequence[torch.optim.Optimizer]


def optimizers_in(given: Any) -> list[Any]:
    """One optimizer, or those of a list. An empty list if it is anything else."""
    found = list(given) if isinstance(given, (list, tuple)) else [given]
    are_all = all(isinstance(one, torch.optim.Optimizer) for one in found)
    return found if are_all and len(set(map(id, found))) == len(found) else []


def around_updates(optimizers: Optimizers, meter: Meter, before: Callable[[], None], after: Callable[[], None]) -> None:
    """Call `before` and `after` around each update: one step of each optimizer, in any order. A step raises
    `UnsupportedError` if the steps are not one of each.
    """
    stepped: list[torch.optim.Optimizer] = []
    passes = 0

    def before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        nonlocal passes
        if meter.hooks.is_closed:
            return
        if not stepped:
            passes = meter.hooks.passes_of_run
            before()
        elif optimizer in stepped or meter.hooks.passes_of_run != passes:
            waiting = ", ".join(type(one).__name__ for one in optimizers if one not in stepped)
            stepped.clear()
            raise UnsupportedError(
                f"ds_lena.watch: a backward pass, or step() of {type(optimizer).__name__} again, before step() of "
                f"{waiting}. An update is one step() of each optimizer that was given, without a backward pass in "
                "between; torch's GradScaler, which leaves a step() out, is not supported here. Optimizers that step "
                "apart need a watch each: watch(model, optimizer)."
            )

    def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if meter.hooks.is_closed:
            return
        stepped.append(optimizer)
        if len(stepped) == len(optimizers):
            stepped.clear()
            after()

    for one in optimizers:
        one.register_step_pre_hook(before_step)
        one.register_step_post_hook(after_step)


def watch_plain(model: torch.nn.Module, optimizers: Optimizers, config: WatchConfig) -> Watch:
    """Watch optimizers of torch that move a model together, in one process or under DDP.

    Raises:
        UnsupportedError: parameters in a form for which it would not be exact.
    """
    watcher = Watcher(config, *_trained(model, optimizers))
    watcher.meter.bind_plain()
    watch = watcher.shown()

    def after() -> None:
        watcher.end_update(applied=True)
        watch.updated()

    for one in optimizers:
        one.register_step_pre_hook(functools.partial(_require_measured, watch))
    around_updates(optimizers, watcher.meter, watcher.begin_update, after)
    return watch


def _trained(model: torch.nn.Module, optimizers: Optimizers) -> tuple[list[Tensor], list[str]]:
    """The parameters of the optimizers that need a gradient, in the order of the model, and their names."""
    name_of = {id(parameter): name for name, parameter in named_parameters(model)}
    held = [p for one in optimizers for group in one.param_groups for p in group["params"] if p.requires_grad]
    require_supported(held)
    in_order = {id(p): p for p in held}
    known = [in_order[i] for i in dict.fromkeys(name_of) if i in in_order]
    parameters = known + [p for p in in_order.values() if id(p) not in name_of]
    return parameters, [name_of.get(id(p), f"param_{i}") for i, p in enumerate(parameters)]


def refuse_closure(who: str, args: Sequence[Any], keys: dict[str, Any]) -> None:
    """Raise `UnsupportedError` for a step with these arguments, if it makes its gradients itself."""
    if any(callable(value) for value in (*args, *keys.values())):
        raise UnsupportedError(
            f"{who}: optimizer.step(closure) calls backward within the step, where it cannot be measured. Call "
            "backward before step(), without a closure."
        )


def _require_measured(
    watch: Watch, optimizer: torch.optim.Optimizer, args: Sequence[Any], keys: dict[str, Any]
) -> None:
    """Raise `UnsupportedError` for a step that makes its gradients itself, or has scaled ones."""
    if watch.is_closed:
        return
    refuse_closure("ds_lena.watch", args, keys)
    if getattr(optimizer, "grad_scale", None) is not None:
        raise UnsupportedError(
            "ds_lena.watch: torch.amp.GradScaler is not supported: its changing loss scale would enter the "
            "statistics. Use bfloat16, which needs no loss scaling."
        )
