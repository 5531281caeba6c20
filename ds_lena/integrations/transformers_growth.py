"""A batch that grows in HF Trainer, under DeepSpeed, in DDP and in one process.

from ds_lena.integrations.transformers_growth import BatchGrowthCallback
BatchGrowthCallback.add_to(trainer, BatchGrowth(…), budget_samples=…, schedule=cosine(total=…))
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from accelerate.utils import DeepSpeedOptimizerWrapper
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from ..errors import ConfigError
from ..growing import Growing
from ..growth import BatchGrowth, from_keys
from ..keys import is_number
from ..optimizer import LENA, controller_of
from ..reporting import find_lena
from ..sample_schedules import SampleSchedule
from . import _transformers_internals as hf
from .deepspeed._internals.engine import EngineView
from .deepspeed.ownership import engine_of
from .transformers import NoiseScaleCallback, add, stored

logger = logging.getLogger("ds_lena")


class BatchGrowthCallback(NoiseScaleCallback):
    """Lets the batch of a Trainer follow the noise scale, and resumes where it was. It watches and logs, too.

    It changes `gradient_accumulation_steps` where a window of the new length can begin: at a multiple of it since the
    start of the epoch. The Trainer's own number is the smallest. After `train()` has begun, `growing` is the `Growing`.

    Args:
        growth: how it grows; `smallest` and `largest` count the micro-batches of all ranks.
        budget_samples, budget_tokens: the length of the run, in place of `max_steps`; `budget_tokens` needs
            `tokens_per_sample`. The run ends before the update that would go over it. None: the Trainer's
            `num_train_epochs`.
        schedule: the learning rate as a function of samples, in place of the Trainer's scheduler.
        layers, keys: see `NoiseScaleCallback`.
    """

    def __init__(
        self,
        growth: BatchGrowth | dict[str, Any],
        budget_samples: float | None = None,
        budget_tokens: float | None = None,
        schedule: SampleSchedule | dict[str, Any] | None = None,
        layers: bool = False,
        **keys: Any,
    ) -> None:
        super().__init__(layers, **keys)
        self.growth = BatchGrowth.from_keys(growth)
        self.schedule: SampleSchedule | None = None if schedule is None else from_keys(SampleSchedule, schedule)
        self.budget = _in_samples(budget_samples, budget_tokens, keys.get("tokens_per_sample"))
        self.growing: Growing | None = None
        self._passes = 0  # of this rank in the window at hand
        # Of one rank: micro-batches that were trained, before this call of train() and by now; in an epoch, None for
        # data without a length; and of the whole run.
        self._done_before = self._done = self._budget = 0
        self._epochs = 0  # that the Trainer plans
        self._is_applied = False  # the update at hand
        self._length: int | None = None
        self._first = self._size = self._replicas = 1
        self._view: EngineView | None = None
        self._trainer: Any = None
        self._saved: dict[str, Any] | None = None
        self._set_lr: Callable[[], None] = lambda: None

    @classmethod
    def add_to(cls, trainer: Trainer, growth: BatchGrowth, **keys: Any) -> BatchGrowthCallback:  # type: ignore[override]
        """Put a new callback before all others of the Trainer. Before `train()`. `keys`: see the class.

        Raises:
            ConfigError: a key is not allowed, the Trainer's arguments do not go together with growth, or it has such a
                callback already.
        """
        callback = cls(growth, **keys)
        callback.follow(trainer)
        return callback

    def follow(self, trainer: Trainer) -> None:
        """Do what `add_to` does, with a callback that is made already."""
        self._trainer = trainer
        self._first = trainer.args.gradient_accumulation_steps
        self._require_fit(trainer.args)
        if any(isinstance(each, BatchGrowthCallback) for each in trainer.callback_handler.callbacks):
            raise ConfigError(
                "BatchGrowthCallback: this Trainer has one already. Call BatchGrowthCallback.add_to(trainer, …) once, "
                "and leave it out of callbacks=[…]."
            )
        trainer.callback_handler.callbacks.insert(0, self)
        hf.follow(trainer, self)

    def state(self) -> dict[str, Any]:
        """What the Trainer saves in a checkpoint."""
        args = {
            "growth": asdict(self.growth),
            "budget_samples": self.budget,
            "schedule": None if self.schedule is None else asdict(self.schedule),
            "layers": self.layers,
            **self._keys,
        }
        return {"args": args, "attributes": {"saved": None if self.growing is None else self.growing.state_dict()}}

    # -- what the Trainer plans ---------------------------------------------------------------------------------------

    def plan(self, args: Any, planned: hf.Plan) -> hf.Plan:
        """The Trainer's plan at the start of `train()`, for the budget. All is in micro-batches of one rank."""
        self._require_fit(args)
        self._replicas = self._trainer.get_total_train_batch_size(args) // (args.train_batch_size * self._first)
        self._size = args.train_batch_size
        self._length = planned.steps_in_epoch if hf.has_length(self._trainer) else None
        if self.budget is not None:
            self._budget = int(self.budget // (self._size * self._replicas))
        else:
            self._budget = math.ceil(args.num_train_epochs * planned.steps_in_epoch)
        self._done = 0
        updates = self._updates_left(self._first)
        if updates == 0:
            raise ConfigError(
                f"BatchGrowthCallback: a budget of {self.budget} samples is less than the first update takes, "
                f"{self._first * self._size * self._replicas} samples."
            )
        samples = self._budget * self._size * self._replicas
        if self._length is None:
            self._epochs = planned.num_train_epochs
            return planned.changed(
                num_update_steps_per_epoch=self._budget,
                num_train_samples=samples,
                steps_in_epoch=self._budget,
                max_steps=updates,
            )
        self._epochs = math.ceil(self._budget / self._length)
        return planned.changed(num_train_epochs=self._epochs, num_train_samples=samples, max_steps=updates)

    def position(self, state: Any, begin: tuple[int, int], is_resumed: bool) -> tuple[int, int]:
        """Where the Trainer begins: epochs, and micro-batches of one rank in the next. `begin`: by its own count."""
        self._saved = stored(state, self).get("saved") if is_resumed else None
        handler = self._trainer.callback_handler
        if self not in handler.callbacks:  # the Trainer has put another one in its place
            handler.callbacks[:] = [self, *(each for each in handler.callbacks if not isinstance(each, type(self)))]
        if self._saved is None:
            epochs, steps = begin
            self._done = epochs * (self._length or 0) + steps
            return begin
        size = self._saved["micro_batch_size"]
        self._done = self._saved["micro_batches"] * size // (self._size * self._replicas)
        window = self._saved["n"] * size // (self._size * self._replicas)
        window = self.growth.within_bounds(window, self._replicas, self._first)
        if self._updates_left(window) == 0:  # the Trainer would train one all the same
            logger.warning("BatchGrowthCallback: no update fits into the rest of the run. Nothing is trained.")
            return self._epochs, 0
        return divmod(self._done, self._length) if self._length else (0, self._done)

    def samples_of_call(self) -> int:
        """Samples that were trained since `train()` was called."""
        return (self._done - self._done_before) * self._size * self._replicas

    # -- the training -------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer on every rank, when all is made and nothing is trained."""
        if self._trainer is None:
            raise ConfigError(
                "BatchGrowthCallback: it has to know its Trainer. Leave it out of callbacks=[…] and add_callback(…), "
                "and call BatchGrowthCallback.add_to(trainer, …) before train()."
            )
        scheduler = self._require_scheduler(kwargs["lr_scheduler"])
        super().on_train_begin(args, state, control, **kwargs)
        assert self.watch is not None
        optimizer = kwargs["optimizer"]
        engine = engine_of(kwargs["model"]) if isinstance(optimizer, DeepSpeedOptimizerWrapper) else None
        self._view = None if engine is None else EngineView(engine)
        growing = Growing(self.growth, self.schedule, self.watch, self._replicas, self._size, lowest=self._first)
        self.growing, self._passes, self._done_before = growing, 0, self._done
        self._is_applied = False
        self.watch.after_update.append(self._was_applied)
        if self._saved is not None:
            growing.load_state_dict(self._saved)
        else:
            growing.saw(self._done)
        growing.accumulation = self._aligned(growing.accumulation)
        self._set(args)
        self._replace(scheduler)
        lena = find_lena(optimizer)
        if isinstance(lena, LENA):
            controller_of(lena).grows_from(lambda: growing.first_n)
        self._tell(state)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called after each micro-batch but the last of an update."""
        self._passes += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called after each update."""
        growing = self.growing
        assert growing is not None
        growing.saw(self._passes + 1)
        before = self._done
        self._done += self._passes + 1
        self._passes = 0
        is_applied, self._is_applied = self._is_applied, False
        if is_applied and growing.decide(self._in_epoch()):
            self._set(args)
        self._set_lr()  # the Trainer's scheduler makes no step after a skipped update
        self._tell(state)
        self._set_intervals(args, state, before)
        if self._updates_left(growing.accumulation) == 0:
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called after each epoch. Data without a length has one."""
        if self._length is None and not control.should_training_stop:
            logger.warning(
                "BatchGrowthCallback: the data ended after %d of the budget's %d samples, and the training with it. "
                "The last %d micro-batches of each rank made no whole update.",
                self._done * self._size * self._replicas,
                self._budget * self._size * self._replicas,
                self._passes,
            )
            state.max_steps = state.global_step
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Called by the Trainer on every rank: `lena/batch`, in micro-batches, and `lena/samples` too."""
        super().on_log(args, state, control, logs, **kwargs)
        if self.growing is not None and logs is not None and "loss" in logs:
            add({"lena/batch": float(self.growing.n), "lena/samples": float(self.growing.samples or 0)}, logs, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called at the end of `train()`: the Trainer gets its own number back."""
        args.gradient_accumulation_steps = self._first

    def _was_applied(self) -> None:
        self._is_applied = True

    def _in_epoch(self) -> int:
        return self._done % self._length if self._length else self._done

    def _aligned(self, accumulation: int) -> int:
        """The next smaller window that can begin here. Other ranks than a checkpoint's may stand where none of it can.

        Raises:
            ConfigError: it is smaller than the Trainer's own number.
        """
        while self._in_epoch() % accumulation:
            accumulation -= 1
        if accumulation < self._first:
            raise ConfigError(
                f"BatchGrowthCallback: the checkpoint is at micro-batch {self._in_epoch()} of an epoch, where no "
                f"window of {self._first} or more can begin. Set gradient_accumulation_steps to {accumulation}, or "
                "use as many ranks as before."
            )
        return accumulation

    def _set(self, args: Any) -> None:
        growing = self.growing
        assert growing is not None
        args.gradient_accumulation_steps = growing.accumulation
        if self._view is not None:
            self._view.set_accumulation(growing.accumulation)
        logger.info("BatchGrowthCallback: %s.", growing.report()["advice"])

    def _updates_left(self, accumulation: int) -> int:
        """Updates that fit into the rest of the budget. The last one of an epoch can be short."""
        left = max(self._budget - self._done, 0)
        if self._length is None:
            return left // accumulation
        in_epoch = min(self._length - self._in_epoch(), left)
        epochs, rest = divmod(left - in_epoch, self._length)
        ends = in_epoch < left or (self._done + in_epoch) % self._length == 0  # this epoch ends within the budget
        now = math.ceil(in_epoch / accumulation) if ends else in_epoch // accumulation
        return now + epochs * math.ceil(self._length / accumulation) + rest // accumulation

    def _tell(self, state: Any) -> None:
        """How many updates there will be, if the batch stays as it is."""
        assert self.growing is not None
        state.max_steps = state.global_step + self._updates_left(self.growing.accumulation)
        hf.set_progress(self._trainer, state.max_steps)

    def _set_intervals(self, args: Any, state: Any, before: int) -> None:
        """Let what is below 1 of `logging_steps`, `eval_steps` and `save_steps` be a share of the run's samples.

        The Trainer makes updates of it once, by its first plan, and acts where `global_step` is a multiple.
        """
        for name in ("logging_steps", "eval_steps", "save_steps"):
            share = getattr(args, name) or 0
            if 0 < share < 1:
                parts = [math.floor(done / (share * self._budget) + 1e-9) for done in (before, self._done)]
                setattr(state, name, state.global_step if parts[0] < parts[1] else state.global_step + 1)

    # -- the learning rate --------------------------------------------------------------------------------------------

    def _require_scheduler(self, scheduler: Any) -> LambdaLR:
        """The scheduler inside its wrappers: one that can be replaced, or a constant one if there is no schedule."""
        while hasattr(scheduler, "scheduler"):
            scheduler = scheduler.scheduler
        if isinstance(scheduler, LambdaLR) and (self.schedule is not None or hf.is_constant(scheduler)):
            return scheduler
        raise ConfigError(
            f"BatchGrowthCallback: the scheduler {type(scheduler).__name__} counts updates, and a batch that grows "
            'makes fewer of them. Use "lr_scheduler_type": "constant", optimizers=(optimizer, None), and no '
            '"scheduler" in the DeepSpeed configuration. For a learning rate that falls give schedule=…, such as '
            "ds_lena.cosine(total=samples)."
        )

    def _replace(self, scheduler: LambdaLR) -> None:
        """Let the Trainer's scheduler set what is set here. Without that, it stays the constant one."""
        growing = self.growing
        assert growing is not None
        if not growing.sets_lr:
            return
        # The Trainer steps it at the end of an update, before on_step_end.
        per_pass = self._size * self._replicas
        scheduler.lr_lambdas = [
            lambda _: growing.lr_factor((growing.samples or 0) + (self._passes + 1) * per_pass)
            for _ in scheduler.base_lrs
        ]

        def set_lr() -> None:
            for group, start in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True):
                group["lr"] = start * growing.lr_factor(growing.samples or 0)

        self._set_lr = set_lr
        set_lr()

    # -- what does not go together ------------------------------------------------------------------------------------

    def _require_fit(self, args: Any) -> None:
        if args.max_steps > 0 and self.budget is None:
            raise ConfigError(
                f'BatchGrowthCallback: "max_steps": {args.max_steps} counts updates, and a batch that grows makes '
                "fewer of them from the same data. Give budget_samples=… or budget_tokens=…, the length of the run, in "
                "its place. Data without a length needs both; then max_steps is not used."
            )
        if args.train_sampling_strategy not in ("random", "sequential"):
            raise ConfigError(
                f'BatchGrowthCallback: "train_sampling_strategy": "{args.train_sampling_strategy}" sorts the data by '
                'the first batch, and a batch that grows is another one. Use "random" or "sequential".'
            )
        if self.schedule is None and args.lr_scheduler_type.value != "constant":
            raise _scheduler_in_updates(args.lr_scheduler_type.value)
        if self.schedule is not None and args.warmup_steps:
            raise ConfigError(
                f'BatchGrowthCallback: "warmup_steps": {args.warmup_steps} counts updates. Give the schedule a warm-up '
                "in samples: cosine(total=…, warmup=…)."
            )
        if args.ignore_data_skip:
            raise ConfigError(
                'BatchGrowthCallback: "ignore_data_skip": true trains other samples after a resume, and the count of '
                "samples would not be that of the data. Leave it out."
            )
        if args.auto_find_batch_size:
            raise ConfigError(
                'BatchGrowthCallback: "auto_find_batch_size": true changes the micro-batch while the Trainer runs. '
                "Give per_device_train_batch_size."
            )


def _scheduler_in_updates(name: str) -> ConfigError:
    return ConfigError(
        f'BatchGrowthCallback: "lr_scheduler_type": "{name}" counts updates, and a batch that grows makes fewer of '
        'them. Give schedule=…, such as ds_lena.cosine(total=samples), or use "constant".'
    )


def _in_samples(samples: Any, tokens: Any, tokens_per_sample: float | None) -> float | None:
    for name, value in (("budget_samples", samples), ("budget_tokens", tokens)):
        if value is not None and not (is_number(value) and value > 0):
            raise ConfigError(f'BatchGrowthCallback: "{name}": {value!r} is not allowed; allowed is a number > 0.')
    if samples is not None and tokens is not None:
        raise ConfigError("BatchGrowthCallback: give budget_samples or budget_tokens, not both.")
    if tokens is not None and tokens_per_sample is None:
        raise ConfigError('BatchGrowthCallback: "budget_tokens" needs "tokens_per_sample".')
    return samples if tokens is None else tokens / tokens_per_sample
