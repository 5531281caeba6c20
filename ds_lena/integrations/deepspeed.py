"""LENA under a DeepSpeed engine: refuse what is not supported, read the layout, and run around the engine's step."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..config import unknown_total_steps
from ..errors import ConfigError, StateError, UnsupportedError
from ..layers import named_parameters
from ..monitor import events, layer_events, report
from ..norms import squared_norms
from ..optimizer import LENA, dormant
from ..probe import Probe
from ..reduce import Group
from ..shards import Segment
from . import _deepspeed_private as private
from . import transformers as hf

logger = logging.getLogger("ds_lena")

_owner: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Parameter -> weak reference to the engine whose LENA trains it."""


def install(engine_module: ModuleType) -> None:
    """Called once, when `deepspeed.runtime.engine` is imported: `"type": "LENA"` and client LENAs find their engine."""
    private.wrap_configure_optimizer(engine_module, _configure)


def _configure(
    engine: Any, original: Callable[..., None], client_optimizer: Any, model_parameters: list[Tensor]
) -> None:
    """DeepSpeed makes (or takes) the optimizer and wraps it; if it is LENA we check before and attach after."""
    named_in_json = client_optimizer is None and engine.optimizer_name() == LENA.__name__
    if named_in_json or isinstance(client_optimizer, LENA):
        _refuse_unsupported(engine)
        _require_free(engine, model_parameters if named_in_json else client_optimizer.parameters)
        _warn_of_version()
    private.allow_under_zero(LENA)
    with dormant():
        original(client_optimizer, model_parameters)
    lena = private.basic_optimizer(engine)
    if isinstance(lena, LENA):
        _refuse_unsupported(engine)  # again: a callable may have made a LENA that nobody knew of before
        attach(engine, lena)


def _refuse_unsupported(engine: Any) -> None:
    for is_on, what, instead in private.refusals(engine):
        if is_on:
            raise UnsupportedError(f"LENA does not support {what} yet. Nearest supported choice: {instead}.")


def _warn_of_version() -> None:
    import deepspeed

    if deepspeed.__version__.split("+")[0] != private.SEEN_WITH:
        logger.warning(
            "LENA was tested with DeepSpeed %s; this is %s. It reads DeepSpeed's internals and checks them at the "
            "start: install the tested version if that check fails.",
            private.SEEN_WITH,
            deepspeed.__version__,
        )


def attach(engine: Any, lena: LENA) -> None:
    """Give LENA the engine's names and layout, and have it run around the engine's model step.

    Raises:
        UnsupportedError: another engine trains one of the parameters, or the optimizer wrapper is not known.
        ConfigError: the length of the run is not known, or the entry contradicts DeepSpeed's.
        StateError: DeepSpeed's layout is not what this version of ds_lena understands.
    """
    host = EngineHost(engine, lena)
    _check_micro_batch_size(host, lena)
    names, order = _names(engine.module, lena)
    host.check_layout(names)
    _require_known_norm(engine, lena)
    _require_free(engine, lena.parameters)
    _owner.update({parameter: weakref.ref(engine) for parameter in lena.parameters})
    lena.adopt(host, names, order)

    def after(applied: bool) -> None:
        lena.end_update(applied)
        if applied:
            private.write_events(engine, lambda: events(lena.tracker.report()))

    private.wrap_model_step(engine, before=lena.begin_update, after=after)
    private.wrap_destroy(engine, before=lambda: _release(engine, lena))
    private.after_scheduler(engine, lambda: _check_schedule(engine, host, lena))


def write_layers(engine: Any) -> None:
    """Write gain, noise scale and warm-up of every layer to the engine's monitors, now. Every rank may call it.

    DeepSpeed's `tensorboard`, `wandb`, `csv_monitor` and `comet` entries get those of the model after every update,
    which this does not write again.
    """
    private.write_events(engine, lambda: layer_events(report(engine)))


def _check_schedule(engine: Any, host: EngineHost, lena: LENA) -> None:
    if lena.config.warmup != "none" and lena.config.total_steps is None and host.total_steps() is None:
        _release(engine, lena)
        raise unknown_total_steps()
    lena.look_at_scheduler()


def _check_micro_batch_size(host: EngineHost, lena: LENA) -> None:
    given, actual = lena.config.micro_batch_size, host.micro_batch_size()
    if given is not None and given != actual:
        raise ConfigError(
            f'LENA: "micro_batch_size": {given}, but DeepSpeed has "train_micro_batch_size_per_gpu": {actual}. '
            "Leave micro_batch_size out under DeepSpeed."
        )


def _require_known_norm(engine: Any, lena: LENA) -> None:
    """Trust ratios need the norm that DeepSpeed clips by; in fp32 at ZeRO 0 that is over all that the model trains."""
    is_wrapped = engine.optimizer is not lena  # the wrappers clip by the norm of what is in the optimizer
    if not lena.has_trust_ratios or is_wrapped or not engine.gradient_clipping():
        return
    known = {id(parameter) for parameter in lena.parameters}
    foreign = [name for name, p in named_parameters(engine.module) if p.requires_grad and id(p) not in known]
    if foreign:
        raise UnsupportedError(
            f'LENA: "base": "{lena.config.base}" with "gradient_clipping" at ZeRO 0 needs all trained parameters in '
            f'the optimizer, since DeepSpeed clips by the norm of all of them; "{foreign[0]}" is not. Freeze it '
            '(requires_grad_(False)), use ZeRO 1-3, or set "gradient_clipping" to 0.0.'
        )


def _names(model: torch.nn.Module, lena: LENA) -> tuple[list[str], list[int]]:
    """Names of the parameters in the model, and their indices in the model's order (unknown ones last)."""
    index = {id(parameter): i for i, parameter in enumerate(lena.parameters)}
    names = list(lena.parameter_names)
    order = []
    for name, parameter in named_parameters(model):
        if id(parameter) in index:
            names[index[id(parameter)]] = name
            order.append(index[id(parameter)])
    known = set(order)
    return names, order + [i for i in range(len(names)) if i not in known]


def _require_free(engine: Any, given: Iterable[Any]) -> None:
    """Raise `UnsupportedError` where another engine trains one of the given parameters (or groups of them).

    Before DeepSpeed wraps them, since it would move them from under the other engine.
    """
    names = {id(parameter): name for name, parameter in named_parameters(engine.module)}
    for entry in given:
        for parameter in entry["params"] if isinstance(entry, dict) else (entry,):
            other = _owner.get(parameter)
            if other is not None and other() is not None and other() is not engine:
                raise UnsupportedError(
                    f'LENA: "{names.get(id(parameter))}" is already trained by another DeepSpeed engine with LENA. Two '
                    "engines cannot share a parameter: call destroy() on the first engine, or give each engine its own "
                    "parameters."
                )


def _release(engine: Any, lena: LENA) -> None:
    for parameter in lena.parameters:
        owner = _owner.get(parameter)
        if owner is not None and owner() is engine:
            del _owner[parameter]
    lena.close()


class EngineHost:
    """See `shards.Host`: an engine's data-parallel group, layout and configuration."""

    def __init__(self, engine: Any, lena: LENA) -> None:
        self._engine = engine
        self._parameters = lena.parameters
        index = {id(parameter): i for i, parameter in enumerate(self._parameters)}
        layout = private.read_layout(engine, index)
        if layout is None:
            raise UnsupportedError(
                f"LENA does not support the optimizer wrapper {type(engine.optimizer).__name__} yet. "
                "Nearest supported choice: ZeRO 0-3 in fp32 or bf16, without offload."
            )
        self._layout = layout

    def watch_passes(self, probe: Probe) -> None:
        """Where the layout keeps old gradients, clear those of parameters that a window's first pass left alone."""
        self._norms = probe.new_norms()
        if not isinstance(self._layout, private.Zero3Layout):
            return
        layout = self._layout

        def after_pass() -> None:
            if probe.passes == 1:
                for parameter in probe.unreached():
                    layout.clear_gradient(parameter)

        probe.after_pass = after_pass

    @property
    def group(self) -> Group:
        return private.data_parallel_group(self._engine)

    def segments(self) -> list[tuple[Tensor, list[Segment]]]:
        return self._layout.segments()

    def squares_of_mean(self) -> Tensor:
        return squared_norms(self._layout.gradients(), self._norms)

    def gradients(self) -> Iterator[tuple[int, Tensor | None]]:
        return self._layout.gradients()

    def clip_coefficient(self, norm: Tensor) -> Tensor | None:
        return private.clip_coefficient(self._engine, norm)

    def shape(self, parameter: int) -> torch.Size:
        return private.logical_shape(self._parameters[parameter])

    def micro_batch_size(self) -> int:
        return self._engine.train_micro_batch_size_per_gpu()

    def planned_n(self) -> int:
        return self._engine.gradient_accumulation_steps() * torch.distributed.get_world_size(self.group)

    def total_steps(self) -> int | None:
        return private.scheduler_total_steps(self._engine) or hf.planned_updates(self._engine.config)

    def check_layout(self, names: list[str]) -> None:
        """Compare every piece of the fp32 weights with the model's own values, before the first update moves them."""
        for flat, segments in self._layout.segments():
            for segment in segments:
                piece = flat.data.reshape(-1).narrow(0, segment.start, segment.length)
                values = self._layout.values(self._parameters[segment.parameter], segment)
                if not torch.equal(piece, values.to(piece)):
                    raise StateError(
                        f'LENA: the weights of "{names[segment.parameter]}" do not lie where this version of ds_lena '
                        f"expects them in DeepSpeed's {type(self._engine.optimizer).__name__}. Install DeepSpeed "
                        f"{private.SEEN_WITH}, or report this configuration."
                    )
