"""One engine as LENA sees it: its facts, its group of ranks, its counts, and the calls that LENA adds to it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .facts import EngineFacts, read_facts
from .grid import Grid, read_grid


@dataclass(frozen=True)
class Asked:
    """What `load_checkpoint` is asked for.

    `is_strict`: names of the module and the checkpoint must be the same. `wants_state`: the optimizer's state too.
    `wants_schedule`: the scheduler's. `module_only`: nothing but the module. `loads_module`: the caller has a function
    for the module.
    """

    folder: Path
    tag: str | None
    is_strict: bool
    wants_state: bool
    wants_schedule: bool
    module_only: bool
    loads_module: bool


class EngineView:
    """All that LENA reads of an engine, and all calls that it adds to it.

    `engine`: the engine itself, for those that only pass it on. What a user can change between updates is a method.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = self._engine = engine

    @functools.cached_property
    def facts(self) -> EngineFacts:
        """How the engine is configured. Read once: for a LENA that is known before, before it is wrapped."""
        return read_facts(self._engine)

    @property
    def module(self) -> torch.nn.Module:
        """The user's model."""
        return self._engine.module

    @property
    def config(self) -> Any:
        """The DeepSpeed configuration as the user gave it."""
        return self._engine.config

    def entry(self, name: str) -> Any:
        """An entry of the JSON that DeepSpeed does not know. None if it is not there."""
        return self._engine._config._param_dict.get(name)

    @property
    def wrapper(self) -> Any:
        """The wrapper that ZeRO or a precision puts around the optimizer. Without one, the optimizer itself."""
        return self._engine.optimizer

    @property
    def optimizer(self) -> Any:
        """The optimizer inside its wrapper."""
        return self._engine.basic_optimizer

    @property
    def optimizer_name(self) -> str | None:
        """The optimizer's type in the JSON."""
        return self._engine.optimizer_name()

    @property
    def optimizer_keys(self) -> Mapping[str, Any]:
        """The optimizer's keys in the JSON."""
        return self._engine.optimizer_params() or {}

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return torch.device(self._engine.device)

    def communication_type(self) -> torch.dtype:
        """In which type of number DeepSpeed adds gradients up."""
        return self._engine.communication_data_type

    @functools.cached_property
    def grid(self) -> Grid:
        """Which ranks share what."""
        return read_grid(self._engine)

    @property
    def part(self) -> int:
        """The number of this rank's part of the model, in names of files."""
        return self._engine.checkpoint_mp_rank

    @property
    def parts(self) -> int:
        """Into how many parts tensor and pipeline parallelism cut the model."""
        return self._engine.mp_world_size

    # -- what can change ----------------------------------------------------------------------------------------------

    def micro_batch_size(self) -> int:
        """Samples in one micro-batch of one rank."""
        return self._engine.train_micro_batch_size_per_gpu()

    def accumulation_steps(self) -> int:
        """Micro-batches of one rank in a full update."""
        return self._engine.gradient_accumulation_steps()

    def configured_window(self) -> int | None:
        """Micro-batches of one rank in a full update. None if the caller alone says when an update ends."""
        return self.accumulation_steps() if self._engine.managed_gradient_accumulation() else None

    def begun(self) -> tuple[int, int]:
        """The micro-batches of one rank in an unfinished update, and in a full one. 0 where the caller ends updates."""
        engine, steps = self._engine, self.accumulation_steps()
        counts = engine._is_gradient_accumulation_boundary is None and engine.managed_gradient_accumulation()
        return engine.micro_steps % steps if counts else 0, steps

    def begin_window(self) -> None:
        """Have the engine count micro-batches from the beginning of an update again."""
        self._engine.micro_steps -= self._engine.micro_steps % self.accumulation_steps()

    @property
    def scheduler(self) -> Any:
        """The engine's learning-rate scheduler, from the JSON or given to `initialize`. None without one."""
        return self._engine.lr_scheduler

    @property
    def is_scheduled(self) -> bool:
        """Whether a schedule sets the learning rate in each update: a scheduler's, or that of a growing batch."""
        growing = getattr(self._engine, "ds_lena_growing", None)
        return self.scheduler is not None or (growing is not None and growing.sets_lr)

    def set_accumulation(self, steps: int) -> None:
        """Have each update from now on take so many micro-batches of one rank. Between two updates only.

        DeepSpeed ends an update where the micro-batches since the start of the run are a multiple of `steps`. So they
        are counted anew, or the next update would come early, and be divided by a number that it does not have.
        """
        engine = self._engine
        engine.set_train_batch_size(steps * engine.train_micro_batch_size_per_gpu() * engine.dp_world_size)
        engine.micro_steps = 0
        engine.tput_timer.batch_size = engine.train_batch_size()  # for the samples per second that it prints

    def scheduler_total_steps(self) -> int | None:
        """`total_num_steps` of the engine's scheduler, from the JSON or given to `initialize`."""
        value: Any = getattr(self._engine.lr_scheduler, "total_num_steps", None)
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        return int(value) if is_number and value == value // 1 else None  # JSON may have 1e2

    def largest_norm(self) -> float:
        """To which norm DeepSpeed clips gradients before `step()`. 0 if clipping is off.

        A wrapper has a bound of its own: at ZeRO 1 and 2 a checkpoint's replaces that of the configuration.
        """
        return float(getattr(self.wrapper, "clip_grad", self._engine.gradient_clipping()) or 0.0)

    # -- calls that are added -----------------------------------------------------------------------------------------

    def around_model_step(self, before: Callable[[], object], after: Callable[[bool], None]) -> None:
        """Call `before()` between the reduction and the clipping of an update, and `after(applied)` after the update.

        The engine's `step` runs both at every gradient accumulation boundary, also for an update that it skips.
        """
        engine, original = self._engine, self._engine._take_model_step

        def take_model_step(*args: Any, **kwargs: Any) -> Any:
            before()
            applied = False
            try:
                result = original(*args, **kwargs)
                applied = engine.was_step_applied()
            finally:
                after(applied)
            return result

        engine._take_model_step = take_model_step

    def reduces_now(self) -> bool:
        """Whether the gradients of this window are complete, and reduced, at the end of the backward pass that runs."""
        engine = self._engine
        reduces = engine.enable_backward_allreduce and not engine.inside_no_sync_ctxt
        return reduces and engine.is_gradient_accumulation_boundary()

    def before_forward(self, action: Callable[[], None]) -> None:
        """Call `action()` before each forward pass of the engine."""
        self._engine.register_forward_pre_hook(lambda *_: action())

    def after_backward(self, action: Callable[[], None]) -> None:
        """Call `action()` after each backward pass. If it `reduces_now()`, the gradient of the window is reduced."""
        self._after(self._engine, "_backward_epilogue", lambda _: action())

    def after_zero_grad(self, action: Callable[[], None]) -> None:
        """Call `action()` after `zero_grad()` of the engine, or of its wrapper. A wrapper calls it in its `step()`."""
        self._after(self._engine, "zero_grad", lambda _: action())
        if self.wrapper is not self.optimizer:
            self._after(self.wrapper, "zero_grad", lambda _: action())

    def around_load(self, loading: Callable[[Asked], AbstractContextManager[bool]]) -> None:
        """Run `load_checkpoint` within `loading(asked)`. If that gives True, it loads the optimizer's state itself."""
        original = self._engine.load_checkpoint
        signature = inspect.signature(original)

        @functools.wraps(original)
        def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            arguments = given.arguments
            asked = Asked(
                folder=Path(arguments["load_dir"]),
                tag=arguments["tag"],
                is_strict=arguments["load_module_strict"],
                wants_state=arguments["load_optimizer_states"] and not arguments["load_module_only"],
                wants_schedule=arguments["load_lr_scheduler_states"] and not arguments["load_module_only"],
                module_only=arguments["load_module_only"],
                loads_module=arguments["custom_load_fn"] is not None,
            )
            with loading(asked) as is_done:
                arguments["load_optimizer_states"] = arguments["load_optimizer_states"] or is_done
                return original(*given.args, **given.kwargs)

        self._engine.load_checkpoint = load_checkpoint

    def before_save(self, action: Callable[[], None]) -> None:
        """Call `action()` before `save_checkpoint` writes one."""
        original = self._engine.save_checkpoint

        @functools.wraps(original)
        def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
            action()
            return original(*args, **kwargs)

        self._engine.save_checkpoint = save_checkpoint

    def after_load(self, action: Callable[[], None]) -> None:
        """Call `action()` after `load_checkpoint` has loaded one."""
        self._after(self._engine, "load_checkpoint", lambda result: action() if result[0] is not None else None)

    @staticmethod
    def _after(owner: Any, method: str, action: Callable[[Any], None]) -> None:
        original = getattr(owner, method)

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            action(result)
            return result

        setattr(owner, method, call)

    def after_step(self, action: Callable[[], None]) -> None:
        """Call `action()` at the end of each `step()`, or `train_batch()` of a pipeline engine, whatever it did."""
        is_pipeline = hasattr(self._engine, "train_batch")
        self._after(self._engine, "train_batch" if is_pipeline else "step", lambda _: action())

    def in_checkpoints(self, key: str, state: Callable[[], Any], load: Callable[[Any], None] = lambda _: None) -> None:
        """Save `state()` in each checkpoint, under a key of its client state, and give it to `load` when one is loaded.

        `load` gets None from a checkpoint without it. Weights alone, by `load_module_only`, are loaded without it.
        """
        engine, save, restore = self._engine, self._engine.save_checkpoint, self._engine.load_checkpoint

        @functools.wraps(save)
        def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
            call = inspect.signature(save).bind(*args, **kwargs)
            call.arguments["client_state"] = {**call.arguments.get("client_state", {}), key: state()}
            return save(*call.args, **call.kwargs)

        @functools.wraps(restore)
        def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
            path, client_state = restore(*args, **kwargs)
            saved = client_state.pop(key, None) if client_state else None
            call = inspect.signature(restore).bind(*args, **kwargs)
            if path is not None and not call.arguments.get("load_module_only", False):
                load(saved)
            return path, client_state

        engine.save_checkpoint, engine.load_checkpoint = save_checkpoint, load_checkpoint

    def after_scheduler(self, action: Callable[[], None]) -> None:
        """Call `action()` right after the engine has made its learning-rate scheduler, inside `initialize`."""
        original = self._engine._configure_lr_scheduler

        def configure(*args: Any, **kwargs: Any) -> None:
            original(*args, **kwargs)
            action()

        self._engine._configure_lr_scheduler = configure

    def before_destroy(self, action: Callable[[], None]) -> None:
        """Call `action()` before the engine is destroyed."""
        self._before(self._engine, "destroy", action)

    def before_load(self, action: Callable[[], None]) -> None:
        """Call `action()` before `load_checkpoint` loads one."""
        self._before(self._engine, "load_checkpoint", action)

    @staticmethod
    def _before(owner: Any, method: str, action: Callable[[], None]) -> None:
        original = getattr(owner, method)

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            action()
            return original(*args, **kwargs)

        setattr(owner, method, call)


def write_events(engine: Any, values: Callable[[], Mapping[str, float]]) -> None:
    """Write `values()` to the engine's monitors, as DeepSpeed does. Only rank 0 calls `values`, and writes."""
    if engine.monitor.enabled and engine.global_rank == 0:
        engine.monitor.write_events(
            [(f"Train/{name}", value, engine.global_samples) for name, value in values().items()]
        )


def has_more_parts(parameter: Tensor) -> bool:
    """Whether DeepSpeed's functions that work in tiles have marked the gradient at hand: not that of the last tile."""
    return not getattr(parameter, "ds_grad_is_ready", True)


def logical_shapes(parameters: Iterable[Tensor]) -> list[torch.Size]:
    """Shapes of the whole parameters, also if ZeRO-3 has partitioned them."""
    return [torch.Size(getattr(parameter, "ds_shape", parameter.shape)) for parameter in parameters]
