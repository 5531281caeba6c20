"""Attaches LENA to a DeepSpeed engine: refuse what is not supported, read the layout, run around the engine's step."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

from torch import Tensor

from ...binding import Binding
from ...config import LenaConfig, unknown_total_steps
from ...controller import Controller
from ...errors import ConfigError, StateError, UnsupportedError
from ...layers import named_parameters
from ...optimizer import LENA, controller_of, dormant, watch_anew
from ...schedule import carrier
from ...update.rules import RULES
from . import growth, ownership, watch
from ._internals import SEEN_WITH, loss_scale, seam
from ._internals.cpu_adam import adamw_on_cpu
from ._internals.engine import EngineView
from .axes import parts_of
from .bind import check_layout, engine_binding
from .exchange import require_same_keys, together
from .frozen import Frozen
from .monitor import write_model
from .nonfinite import Nonfinite
from .reshard import Resharding
from .support import in_use, refuse_unsupported
from .window import Window

logger = logging.getLogger("ds_lena")

_NO_CHECKPOINT = (
    'with "offload_optimizer" to NVMe DeepSpeed 0.19.8 loads no state of an optimizer from a checkpoint, and not all '
    "weights. So load_checkpoint() is refused: a run goes from its start to its end in one engine. Use "
    'engine.save_16bit_model() to keep the weights, or "device": "cpu" to go on from checkpoints.'
)


def install(engine_module: ModuleType) -> None:
    """Attach every LENA that an engine gets, from the JSON or from the client.

    Called once, when `deepspeed.runtime.engine` is imported.
    """
    seam.wrap_configure_optimizer(engine_module, _configure)


def _configure(
    engine: Any, original: Callable[..., None], client_optimizer: Any, model_parameters: list[Tensor]
) -> None:
    """Have DeepSpeed make or take the optimizer, and wrap it. For a LENA, check before that and attach after it."""
    view = EngineView(engine)
    ownership.remember(engine)
    named_in_json = client_optimizer is None and view.optimizer_name == LENA.__name__
    if named_in_json or isinstance(client_optimizer, LENA):

        def check() -> None:
            refuse_unsupported(view.facts)
            if named_in_json:
                _require_fit(view, LenaConfig.from_keys(view.optimizer_keys))
            else:
                _require_welcome(view)
                _require_fit(view, controller_of(client_optimizer).config)

        # What is wrong on one rank alone would leave the others in DeepSpeed's own collectives.
        together(view.grid.everything, check)
        if not named_in_json:
            watch_anew(client_optimizer)
        given = model_parameters if named_in_json else controller_of(client_optimizer).parameters
        ownership.require_free(engine, view.module, given)
        _warn_of_version()
    seam.allow_under_zero(LENA)
    with dormant():
        original(client_optimizer, model_parameters)
    if isinstance(view.optimizer, LENA):
        attach(view, view.optimizer)
    entry = view.entry(watch.ENTRY)
    if entry is not None:
        watch.watch_by_entry(engine, entry)
    of_growth = view.entry(growth.ENTRY)
    if of_growth is not None:
        view.after_scheduler(lambda: growth.grow_by_entry(engine, of_growth))


def _warn_of_version() -> None:
    import deepspeed

    if deepspeed.__version__.split("+")[0] != SEEN_WITH:
        logger.warning(
            "LENA was tested with DeepSpeed %s; this is %s. It reads DeepSpeed's internals and checks them at the "
            "start: install the tested version if that check fails.",
            SEEN_WITH,
            deepspeed.__version__,
        )


def attach(view: EngineView, lena: LENA) -> None:
    """Bind a LENA to the engine that holds it, and have it run around the engine's model step.

    Raises:
        UnsupportedError: a feature in use is not supported, or another engine trains one of the parameters.
        ConfigError: the length of the run is not known, or the entry contradicts DeepSpeed's own entries.
        StateError: this version of ds_lena does not know DeepSpeed's layout.
    """
    engine, controller = view.engine, controller_of(lena)
    refuse_unsupported(view.facts)  # checked again: a callable that makes a LENA has not been checked before
    _require_fit(view, controller.config)
    logger.info("LENA under DeepSpeed, with what is exact: %s.", "; ".join(in_use(view.facts)))

    def bind() -> Binding:
        same_groups = [] if view.grid.is_split else lena.param_groups
        require_same_keys(view.grid.everything, controller.config.compared(), same_groups, controller.config.base)
        _check_micro_batch_size(view, controller)
        _require_decided_for_experts(view, controller)
        on_cpu = view.facts.offload_optimizer != "none" and controller.config.base == "adamw"
        binding = engine_binding(view, controller.meter, {"adamw": adamw_on_cpu()} if on_cpu else {})
        check_layout(view, binding, controller.parameters)
        _require_known_norm(view, controller)
        ownership.require_free(engine, view.module, controller.parameters)
        return binding

    binding = together(view.grid.everything, bind)
    # It may make a group of ranks, which none of them may miss.
    binding = replace(binding, parts=parts_of(view, binding.placements, binding.order))
    ownership.take(engine, controller.parameters)
    controller.manage(binding)
    carrier.empty(lena.param_groups, is_managed=True)
    Resharding(view, controller, lena)
    window = Window(view, controller.meter)
    frozen = Frozen(view.module, {id(parameter) for group in lena.param_groups for parameter in group["params"]})

    # With a wrapper DeepSpeed looks for itself.
    nonfinite = Nonfinite(lena, controller.config.nonfinite) if view.wrapper is view.optimizer else None

    def release() -> None:
        ownership.release(engine, controller.parameters)
        controller.close()

    def before() -> None:
        _require_open(controller)
        frozen.look()
        window.begin()
        proposal = controller.begin_update(lena.param_groups, lena.state)
        if nonfinite is not None:
            nonfinite.look(proposal)

    def after(applied: bool) -> None:
        controller.end_update(applied)
        window.end()
        if applied:
            write_model(engine, controller)
            controller.updated()

    def check_schedule() -> None:
        config = controller.config
        if config.warmup != "none" and config.total_steps is None and binding.run().total_steps is None:
            release()
            raise unknown_total_steps()
        controller.look_at_scheduler(lena.param_groups)

    if view.facts.fp16:
        loss_scale.change_after_step(view.wrapper)
    if view.facts.offload_optimizer == "nvme":
        logger.warning("LENA: %s", _NO_CHECKPOINT)
        view.before_load(_refuse_load)
    view.around_model_step(before, after)
    view.before_destroy(release)
    view.after_scheduler(check_schedule)


# -- checks -----------------------------------------------------------------------------------------------------------


def _require_welcome(view: EngineView) -> None:
    """With offload DeepSpeed wants its own optimizer, unless it is told otherwise. In the JSON it takes any."""
    if view.facts.offload_optimizer != "none" and view.facts.forces_cpu_optimizer:
        raise ConfigError(
            'LENA: a client optimizer with "offload_optimizer" needs "zero_force_ds_cpu_optimizer": false at the top '
            "of DeepSpeed's configuration. Or name LENA in its optimizer entry, which needs nothing more."
        )


def _require_fit(view: EngineView, config: LenaConfig) -> None:
    """Refuse trust ratios on NVMe."""
    if view.facts.offload_optimizer == "nvme" and RULES[config.base].trust is not None:
        raise UnsupportedError(
            f'LENA does not support "base": "{config.base}" with "offload_optimizer" to NVMe. Trust ratios need all '
            "weights, gradients and moments before the first of them moves, and DeepSpeed has them in memory for one "
            'sub-group at a time. Nearest supported choice: "device": "cpu", or "base": "adamw" or "sgd".'
        )


def _refuse_load() -> None:
    raise UnsupportedError(f"LENA: {_NO_CHECKPOINT}")


def _require_open(controller: Controller) -> None:
    if controller.is_closed:
        raise StateError(
            "LENA: this optimizer belongs to a DeepSpeed engine that was destroyed, and sees no gradients. Make a new "
            "LENA for the new engine; a checkpoint of the old engine can be loaded into it."
        )


def _check_micro_batch_size(view: EngineView, controller: Controller) -> None:
    given, actual = controller.config.micro_batch_size, view.micro_batch_size()
    if given is not None and given != actual:
        raise ConfigError(
            f'LENA: "micro_batch_size": {given}, but DeepSpeed has "train_micro_batch_size_per_gpu": {actual}. '
            "Leave micro_batch_size out under DeepSpeed."
        )


def _require_decided_for_experts(view: EngineView, controller: Controller) -> None:
    if view.facts.experts and controller.config.variant != "default":
        raise UnsupportedError(
            f'LENA: "variant": "{controller.config.variant}" in a model with experts. The authors\' code has one '
            "number of micro-gradients for all layers, and nothing for an expert without tokens. Nearest supported "
            'choice: "variant": "default".'
        )


def _require_known_norm(view: EngineView, controller: Controller) -> None:
    """Trust ratios need the norm that DeepSpeed clips by. In fp32 at ZeRO 0 it covers all that the model trains."""
    is_wrapped = view.wrapper is not view.optimizer  # a wrapper clips by the norm of what the optimizer holds
    if not controller.has_trust_ratios or not view.facts.clips:
        return
    grid, has_experts = view.grid, view.facts.experts
    is_left_out = grid.pipe_ranks * grid.expert_ranks > 1 or (is_wrapped and (grid.is_split or has_experts))
    if view.facts.stage == 0 and is_left_out:
        model = "with experts" if has_experts else "that is split over ranks"
        raise UnsupportedError(
            f'LENA: "base": "{controller.config.base}" with "gradient_clipping" in a model {model}, '
            "at ZeRO 0, needs the norm that DeepSpeed clips by, and DeepSpeed leaves out a part of the model there. "
            'Use ZeRO 1, or set "gradient_clipping" to 0.0.'
        )
    if is_wrapped:
        return
    known = {id(parameter) for parameter in controller.parameters}
    foreign = [name for name, p in named_parameters(view.module) if p.requires_grad and id(p) not in known]
    if foreign:
        raise UnsupportedError(
            f'LENA: "base": "{controller.config.base}" with "gradient_clipping" at ZeRO 0 needs all trained parameters '
            f'in the optimizer, since DeepSpeed clips by the norm of all of them; "{foreign[0]}" is not. Freeze it '
            '(requires_grad_(False)), use ZeRO 1-3, or set "gradient_clipping" to 0.0.'
        )
