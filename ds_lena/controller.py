"""One update from end to end: measure, propose, apply, commit. `meter.py` measures; this decides and moves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .binding import Binding, Watched
from .config import LenaConfig, unknown_total_steps
from .errors import ConfigError
from .grad_stats.hooks import GradientHooks
from .grad_stats.reduce import Group
from .layers import matches, warn_of_patterns
from .meter import Meter, weakly
from .recorded import Number, Recorded
from .schedule import checkpoint
from .schedule.clock import RunPlan
from .schedule.schedule import Memory, Proposal, Schedule
from .update.apply import Applier, Rates, State, prepare
from .update.rules import RULES
from .update.segments import cut_flat
from .update.trust_ratio import TrustRatios, clip_coefficient
from .watch_config import WatchConfig
from .watching import Watch

logger = logging.getLogger("ds_lena")


@dataclass(frozen=True)
class Decision:
    """What one update's statistics lead to.

    `factor` (P,): what multiplies the learning rate of each parameter.
    `clip` (): what an engine will multiply the gradient by before `step()`. None where only this optimizer changes it.
    """

    proposal: Proposal
    factor: Tensor
    clip: Tensor | None


class Controller:
    """Runs the updates of one optimizer: `begin_update`, then `apply` for the groups, then `end_update`.

    `group`: for plain PyTorch, the ranks that average the gradients. None is all ranks.
    `parameter_ids`: the `id` of each parameter. `binding`: describes what runs the updates. `is_managed`: an engine
    runs them. `schedule`: what is remembered. `after_update`: called after each applied update.
    """

    def __init__(self, config: LenaConfig, watched: Watched, group: Group | None) -> None:
        self.config = config
        self.parameter_ids = frozenset(id(parameter) for parameter in watched.parameters)
        self._watched = watched
        self._has_names = watched.has_names
        self.schedule: Schedule
        self.after_update: list[Callable[[], None]] = []
        self._first_n: Callable[[], int] | None = None
        self._warned_of_scheduler = False
        self._warned_of_patterns: set[tuple[str, str]] = set()
        self._proposal: Proposal | None = None
        self.meter = Meter(
            watched.parameters, watched.names, watched.left_out, config.layer, config.exclude, group, config.compared()
        )
        self.meter.after_bind = weakly(self._after_bind)
        self.meter.bind_plain()

    # -- what runs it -------------------------------------------------------------------------------------------------

    @property
    def hooks(self) -> GradientHooks:
        """What sees the micro-gradients."""
        return self.meter.hooks

    @property
    def binding(self) -> Binding:
        """Describes what runs the updates."""
        return self.meter.binding

    @property
    def is_managed(self) -> bool:
        """Whether an engine runs the updates."""
        return self.meter.is_managed

    @property
    def parameters(self) -> Sequence[Tensor]:
        """The parameters that need a gradient, in the order of the optimizer's groups."""
        return self._watched.parameters

    @property
    def has_trust_ratios(self) -> bool:
        """Whether the base rule has trust ratios. They depend on how gradients will be clipped."""
        return RULES[self.config.base].trust is not None

    def manage(self, binding: Binding, drops_empty_groups: bool = True) -> None:
        """Let an engine run the updates from now on. DeepSpeed drops groups without parameters."""
        self._has_names = True
        if drops_empty_groups:
            self._watched = self._watched.without_empty_groups()
        self.meter.manage(binding)

    def require_own_keys(self, config: WatchConfig) -> None:
        """Raise `ConfigError` for keys of a watch by which this does not measure."""
        own = {key: getattr(self.config, key) for key in ("layer", "smoothing", "exclude")} | {"differences": False}
        if not self.is_managed:  # otherwise the engine knows it
            own["micro_batch_size"] = self.config.micro_batch_size
        key = config.contradicted_by(own)
        if key is not None:
            raise ConfigError(
                f'ds_lena.watch: "{key}": {getattr(config, key)!r}, and LENA measures here, with {own[key]!r}. Leave '
                "the key out; if LENA has that key, set it there."
            )

    def shown(self, config: WatchConfig) -> Watch:
        """A watch that shows what this measures."""
        watch = Watch(config, self.meter, lambda: self.schedule)
        self.after_update.append(watch.updated)
        watch.when_closed = lambda: self.after_update.remove(watch.updated)
        return watch

    @property
    def is_closed(self) -> bool:
        """Whether the hooks were removed from the parameters."""
        return self.hooks.is_closed

    def close(self) -> None:
        """Remove the hooks from the parameters. Gradients are not seen afterwards."""
        self.hooks.close()

    def _after_bind(self, keeps: bool) -> None:
        """Start with an empty schedule, or keep it for the same layers on another device or under other ranks."""
        meter = self.meter
        before: Schedule | None = self.schedule if keeps else None
        self._norms_now = self.hooks.new_norms()
        self._layer_of = torch.tensor(meter.table.of_parameter, dtype=torch.long, device=meter.device)
        self.schedule = Schedule(self.config, meter.table, meter.device)
        if before is not None:
            checkpoint.load(self.schedule, checkpoint.to_dict(before))
            known = before.clock
            first_n = None if known.first_n is None else known.first_n.to(meter.device)
            self.schedule.clock = replace(
                self.schedule.clock,
                is_resumed=known.is_resumed,
                follows_first=known.follows_first,
                first_n=first_n,
            )
        self._recorded_decision, self._loss_scale = Recorded(keeps=2), Number(meter.device)
        self._make_update()
        self._patterns_are_checked = False
        if self._has_names:
            self._warn_of_patterns()

    def _make_update(self) -> None:
        """Cut the flat tensors. The parameters of one layer share a learning rate, unless each has a trust ratio."""
        binding, rule, names = self.binding, RULES[self.config.base], self.meter.names
        if self.config.base in binding.moves:
            rule = replace(rule, move=binding.moves[self.config.base])
        decays = [not matches(name, self.config.no_decay) for name in names]
        first: dict[int, int] = {}
        rates = list(range(len(names)))
        if rule.trust is None:
            rates = [first.setdefault(layer, i) for i, layer in enumerate(self.meter.table.of_parameter)]
        cuts = {flat: cut_flat(flat.numel(), pieces, rates, decays) for flat, pieces in binding.layout.segments()}
        self._applier = Applier(rule, cuts)
        self._trust: TrustRatios | None = None
        if rule.trust is not None:
            number = {name: i for i, name in enumerate(self.meter.all_names)}
            self._trust = TrustRatios(
                rule,
                rule.trust,
                self.config,
                binding.layout,
                binding.placements,
                [number[name] for name in names],
                len(self.meter.all_names),
                self._watched.groups_of,
                decays,
                binding.group,
                self.meter.device,
            )

    # -- one update ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def begin_update(self, groups: Sequence[dict[str, Any]], state: State) -> Proposal:
        """Measure, and compute this update's factors. An engine calls it before it clips.

        It makes one all-reduce, and a second one for a base rule with trust ratios.
        """
        self.look_at_scheduler(groups)
        self._require_names()
        if not self._patterns_are_checked:
            self._warn_of_patterns()
        self.meter.begin_update()
        scale = self.binding.layout.loss_scale()
        decision = self._decide(self.meter.reduced(self._squares_now()), scale)
        self.meter.require_average(decision.proposal.measured)
        self._proposal, factor = decision.proposal, decision.factor
        if self._trust is not None:
            factor = self._trust.measure(decision.clip, factor, groups, state)
        self._rates = Rates(factor)
        return self._proposal

    def _decide(self, reduced: Tensor, loss_scale: float) -> Decision:
        """From the statistics of all ranks to the factors. On a GPU all of it is one launch."""
        schedule, plan = self.schedule, self._run_plan()
        memory = schedule.memory(plan)
        clock = memory.clock
        is_new = clock.planned is None, clock.is_resumed, clock.follows_first
        remembered = clock.k, clock.plan, is_new, clock.updates if clock.is_resumed or clock.follows_first else 0
        key = plan, schedule.base_samples, remembered, self.binding.largest_norm() if self.has_trust_ratios else 0.0
        decision = self._recorded_decision(self._decided, key, reduced, self._loss_scale.set(loss_scale), memory)
        counted = replace(decision.proposal.clock, updates=clock.updates + 1)
        return replace(decision, proposal=replace(decision.proposal, clock=counted))

    def _decided(self, key: tuple[Any, ...], reduced: Tensor, loss_scale: Tensor, memory: Memory) -> Decision:
        plan, *_, largest = key
        measured, square_now = self.meter.of(reduced, loss_scale)
        proposal = self.schedule.propose(measured, plan, memory)
        clip = None
        if self.has_trust_ratios and self.is_managed:
            clip = clip_coefficient(square_now.sqrt(), largest) / loss_scale  # which is still in the gradient
        return Decision(proposal, proposal.factor[self._layer_of], clip)

    @property
    def is_in_update(self) -> bool:
        """Whether an update has begun and has not ended."""
        return self._proposal is not None

    def apply(self, groups: Sequence[dict[str, Any]], state: State) -> None:
        """Move the tensors of the groups (modified in place, with their state). Called once per group or sub-group."""
        self._applier.apply(groups, state, self._rates)

    def make_state(self, groups: Sequence[dict[str, Any]], state: State) -> None:
        """Make the base rule's state as it is before the first update, of every parameter that has a gradient."""
        rule = RULES[self.config.base]
        for group in groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    prepare(state[parameter], parameter, rule.buffers(group))

    def end_update(self, applied: bool) -> None:
        """End the update. If it was not applied, nothing of it stays but the count of skipped updates."""
        proposal, self._proposal = self._proposal, None
        self.meter.end_update(applied)
        if proposal is None:
            return
        if applied:
            self.schedule.commit(proposal)
        else:
            self.schedule.skip()

    def updated(self) -> None:
        """Called after each applied update, when nothing of it is left to do."""
        for action in self.after_update:
            action()

    def _require_names(self) -> None:
        if self.config.layer in ("module", "block") and not self._has_names:
            raise ConfigError(
                f'LENA: "layer": "{self.config.layer}" needs the names of the parameters, and they were given without '
                'names. Give model.named_parameters(), or use "layer": "tensor" or "model".'
            )

    def grows_from(self, first_n: Callable[[], int]) -> None:
        """The batch grows: plan the run for the n that it began with, `first_n()`. Before the first update."""
        self._first_n = first_n

    def _run_plan(self) -> RunPlan:
        known = self.binding.run()
        if self._first_n is not None:
            known = known.growing_from(self._first_n())
        total_steps = self.config.total_steps or known.total_steps
        if total_steps is None and self.config.warmup != "none":
            raise unknown_total_steps()
        size = self.config.micro_batch_size if known.micro_batch_size is None else known.micro_batch_size
        return replace(known, total_steps=total_steps, micro_batch_size=size)

    def _squares_now(self) -> Tensor:
        """Of the averaged gradient that an engine will clip. Only trust ratios ask whether it has been changed."""
        meter = self.meter
        return meter.squares(self._norms_now) if self.is_managed and self._trust is not None else meter.squares_of_mean

    # -- warnings -----------------------------------------------------------------------------------------------------

    def look_at_scheduler(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Warn once of a scheduler that warms up too. Its lr before the first update is below the given lr."""
        if self._warned_of_scheduler or self.schedule.updates or self.config.warmup == "none":
            return
        for start, group in zip(self._watched.lr_at_start, groups, strict=False):
            now = group["lr"]
            if not isinstance(now, Tensor) and now < start:
                logger.warning(
                    "LENA: a scheduler starts at lr %g, below the given %g: a warm-up on top of LENA's own. Use a "
                    'scheduler without warm-up, or "warmup": "none".',
                    now,
                    start,
                )
                self._warned_of_scheduler = True
                return

    def _warn_of_patterns(self) -> None:
        self._patterns_are_checked = True
        for key in ("exclude", "no_decay"):
            warn_of_patterns(self.meter.all_names, key, getattr(self.config, key), self._warned_of_patterns)
