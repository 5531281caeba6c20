"""One update from end to end: measure, propose, apply, commit. A `Binding` describes what runs it.

A controller is bound to plain PyTorch until an engine takes over. In plain PyTorch a user may clip or unscale `p.grad`
between backward and step. So the averaged gradient is measured at the end of every backward pass, after DDP's
reduction, and the last measurement before the step counts. An engine says when its reduction has ended.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .binding import Binding, Watched, plain_binding
from .config import LenaConfig, unknown_total_steps
from .errors import ConfigError, UnsupportedError
from .grad_stats import backward
from .grad_stats.agreement import require_agreement, require_average, trace_of
from .grad_stats.hooks import GradientHooks
from .grad_stats.norms import SquaredNorms, squared_norms
from .grad_stats.reduce import Group, default_group, world_size
from .grad_stats.statistics import GradientStatistics
from .layers import LayerTable, Member, build_table, matches, nearest_name, unmatched_patterns
from .parameters import require_supported
from .recorded import Number, Recorded
from .schedule import checkpoint
from .schedule.clock import RunPlan
from .schedule.schedule import Memory, Proposal, Schedule
from .update.apply import Applier, Rates, State, prepare
from .update.rules import RULES
from .update.segments import cut_flat
from .update.trust_ratio import TrustRatios

logger = logging.getLogger("ds_lena")

# DDP finishes its reduction in a callback at the end of backward. With static_graph that callback queues another one.
_CALLBACKS_TO_WAIT = 2


@dataclass(frozen=True)
class Decision:
    """What one update's statistics lead to.

    `square_now` (): the squared norm of the averaged gradient, as it may have been changed since it was averaged.
    `factor` (P,): what multiplies the learning rate of each parameter.
    """

    proposal: Proposal
    square_now: Tensor
    factor: Tensor


class Controller:
    """Runs the updates of one optimizer: `begin_update`, then `apply` for the groups, then `end_update`.

    `group`: for plain PyTorch, the ranks that average the gradients. None is all ranks.
    `parameter_ids`: the `id` of each parameter. `binding`: describes what runs the updates. `is_managed`: an engine
    runs them. `schedule`: what is remembered.
    """

    def __init__(self, config: LenaConfig, watched: Watched, group: Group | None) -> None:
        self.config = config
        self.hooks = GradientHooks(watched.parameters, watched.names)
        self.parameter_ids = frozenset(id(parameter) for parameter in watched.parameters)
        self._watched = watched
        self._group = group
        self._has_names = watched.has_names
        self._warned_of_scheduler = False
        self._warned_of_patterns: set[tuple[str, str]] = set()
        self._proposal: Proposal | None = None
        self.is_managed = False
        self._amend: Callable[[Binding], Binding] = lambda binding: binding
        self._dtype = watched.parameters[0].dtype if watched.parameters else torch.float32
        self._bind_plain()

    # -- what runs it -------------------------------------------------------------------------------------------------

    @property
    def parameters(self) -> Sequence[Tensor]:
        """The parameters that need a gradient, in the order of the optimizer's groups."""
        return self._watched.parameters

    @property
    def names(self) -> list[str]:
        """Their names, from the user or an engine, else `param_0`, `param_1`, … by their place in the groups."""
        return self.hooks.names

    @property
    def has_trust_ratios(self) -> bool:
        """Whether the base rule has trust ratios. They depend on how gradients will be clipped."""
        return RULES[self.config.base].trust is not None

    def amend_plain_binding(self, amend: Callable[[Binding], Binding]) -> None:
        """Change what plain PyTorch is bound to, now and whenever it is bound anew. Before the first update."""
        self._amend = amend
        self._bind_plain()

    def _bind_plain(self) -> None:
        self.bind(self._amend(plain_binding(self.parameters, self.hooks.names, self._plain_group())))

    def manage(self, binding: Binding, drops_empty_groups: bool = True) -> None:
        """Let an engine run the updates from now on. DeepSpeed drops groups without parameters."""
        self.is_managed = self._has_names = True
        if drops_empty_groups:
            self._watched = self._watched.without_empty_groups()
        self.bind(binding)

    @property
    def is_closed(self) -> bool:
        """Whether the hooks were removed from the parameters."""
        return self.hooks.is_closed

    def close(self) -> None:
        """Remove the hooks from the parameters. Gradients are not seen afterwards."""
        self.hooks.close()

    def bind(self, binding: Binding) -> None:
        """Group the parameters into layers under the binding's names, and start with an empty schedule."""
        self.binding = binding
        placements = binding.placements
        names = [placement.name for placement in placements]
        left_out = [
            out or matches(name, self.config.exclude) for name, out in zip(names, self._watched.left_out, strict=True)
        ]
        self._device = self.parameters[0].device if names else torch.device("cpu")
        table = self._layers(left_out)
        self._layer_of = torch.tensor(table.of_parameter, dtype=torch.long, device=self._device)
        self.hooks.names = names
        # DDP with static_graph changes gradients at the end of its first pass, and before we hear of that end.
        self.hooks.unchanged_up_to = binding.layout.unchanged_up_to() if self.is_managed else 0
        self.hooks.refuses_changes = binding.layout.shows_changes()
        self.hooks.watch([not out for out in left_out], [placement.join for placement in placements], binding.parts)
        self.hooks.before_pass = None if self.is_managed else _weakly(self._before_plain_pass)
        self.hooks.after_pass = None if self.is_managed else _weakly(self._after_plain_pass)
        self._mean_norms, self._norms_now = self.hooks.new_norms(), self.hooks.new_norms()
        self._squares_of_mean = self._mean_norms.read()
        self._has_read_mean = False
        self._versions: dict[int, tuple[int, int]] = {}
        self._statistics = GradientStatistics(
            self.hooks, placements, table.of_parameter, table.count, self._cells, binding.group, self._device
        )
        self.schedule = Schedule(self.config, table, self._device)
        self._recorded_decision, self._loss_scale = Recorded(keeps=2), Number(self._device)
        self._make_update(table, names)
        self._ranks_agree = self.is_managed or world_size(binding.group) == 1
        self._trace = trace_of((), self._device)
        self._patterns_are_checked = False
        if self._has_names:
            self._warn_of_patterns()

    def _layers(self, left_out: Sequence[bool]) -> LayerTable:
        """The layers of all ranks in the order of the model; `of_parameter` in the order of this optimizer."""
        placements = self.binding.placements
        own = [
            Member(placements[i].name, placements[i].shape.numel(), left_out[i], placements[i].spread)
            for i in self.binding.order
        ]
        members = self.binding.members_of_all(own)
        table = build_table(members, self.config.layer)
        layer_of = {member.name: layer for member, layer in zip(members, table.of_parameter, strict=True)}
        self._all_names = [member.name for member in members]
        spreads = zip(table.of_parameter, (member.spread for member in members), strict=True)
        self._cells = {(layer, spread) for layer, spread in spreads if layer < table.count}
        return replace(table, of_parameter=tuple(layer_of[placement.name] for placement in placements))

    def _make_update(self, table: LayerTable, names: Sequence[str]) -> None:
        """Cut the flat tensors. The parameters of one layer share a learning rate, unless each has a trust ratio."""
        binding, rule = self.binding, RULES[self.config.base]
        if self.config.base in binding.moves:
            rule = replace(rule, move=binding.moves[self.config.base])
        decays = [not matches(name, self.config.no_decay) for name in names]
        first: dict[int, int] = {}
        rates = list(range(len(names)))
        if rule.trust is None:
            rates = [first.setdefault(layer, i) for i, layer in enumerate(table.of_parameter)]
        cuts = {flat: cut_flat(flat.numel(), pieces, rates, decays) for flat, pieces in binding.layout.segments()}
        self._applier = Applier(rule, cuts)
        self._trust: TrustRatios | None = None
        if rule.trust is not None:
            number = {name: i for i, name in enumerate(self._all_names)}
            self._trust = TrustRatios(
                rule,
                rule.trust,
                self.config,
                binding.layout,
                binding.placements,
                [number[name] for name in names],
                len(self._all_names),
                self._watched.groups_of,
                decays,
                binding.group,
                self._device,
            )

    # -- one update ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def begin_update(self, groups: Sequence[dict[str, Any]], state: State) -> Proposal:
        """Measure, and compute this update's factors. An engine calls it before it clips.

        It makes one all-reduce, and a second one for a base rule with trust ratios.
        """
        self.look_at_scheduler(groups)
        self._require_names()
        self.require_agreement()
        if not self._patterns_are_checked:
            self._warn_of_patterns()
        if self.is_managed and not self._has_read_mean:
            self.read_mean()
        if self.binding.check is not None and self.schedule.updates == 0:
            self.binding.check(self._squares_of_mean)
        scale = self.binding.layout.loss_scale()
        reduced = self._statistics.reduced(self._squares_of_mean, self._squares_now())
        decision = self._decide(reduced, scale)
        measured = decision.proposal.measured
        if not self._ranks_agree:
            require_average(measured.mean_square.sum(), measured.square_of_mean.sum())
            self._ranks_agree = True
        self._proposal, factor = decision.proposal, decision.factor
        if self._trust is not None:
            clip = self.binding.clip(decision.square_now.sqrt())
            if scale != 1.0:  # it is still in the gradient
                clip = torch.full_like(decision.square_now, 1 / scale) if clip is None else clip / scale
            factor = factor * self._trust.measure(clip, groups, state)
        self._rates = Rates(factor)
        return self._proposal

    def _decide(self, reduced: Tensor, loss_scale: float) -> Decision:
        """From the statistics of all ranks to the factors. On a GPU all of it is one launch."""
        schedule, plan = self.schedule, self._run_plan()
        memory = schedule.memory(plan)
        clock = memory.clock
        is_new = clock.planned is None, clock.is_resumed, clock.first_n is None
        remembered = clock.k, clock.plan, is_new, clock.updates if clock.is_resumed or clock.first_n is not None else 0
        key = plan, schedule.base_samples, remembered
        decision = self._recorded_decision(self._decided, key, reduced, self._loss_scale.set(loss_scale), memory)
        counted = replace(decision.proposal.clock, updates=clock.updates + 1)
        return replace(decision, proposal=replace(decision.proposal, clock=counted))

    def _decided(self, key: tuple[Any, ...], reduced: Tensor, loss_scale: Tensor, memory: Memory) -> Decision:
        plan, *_ = key
        measured, square_now = self._statistics.of(reduced, loss_scale)
        proposal = self.schedule.propose(measured, plan, memory)
        return Decision(proposal, square_now, proposal.factor[self._layer_of])

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
        self.forget_mean()
        self.hooks.clear()
        self.hooks.unchanged_up_to = self.binding.layout.unchanged_up_to()
        self.binding.layout.clear_gradients()
        if proposal is None:
            return
        if applied:
            self.schedule.commit(proposal)
        else:
            self.schedule.skip()

    def _require_names(self) -> None:
        if self.config.layer in ("module", "block") and not self._has_names:
            raise ConfigError(
                f'LENA: "layer": "{self.config.layer}" needs the names of the parameters, and they were given without '
                'names. Give model.named_parameters(), or use "layer": "tensor" or "model".'
            )

    def _run_plan(self) -> RunPlan:
        known = self.binding.run()
        total_steps = self.config.total_steps or known.total_steps
        if total_steps is None and self.config.warmup != "none":
            raise unknown_total_steps()
        size = self.config.micro_batch_size if known.micro_batch_size is None else known.micro_batch_size
        return replace(known, total_steps=total_steps, micro_batch_size=size)

    @torch.no_grad()
    def read_mean(self) -> None:
        """Measure the averaged gradient, at the end of a backward pass that has reduced it. The last time counts.

        What a user makes of it later moves the weights, and is not in the statistics.
        """
        self._squares_of_mean = self._squares(self._mean_norms)
        self._has_read_mean = True

    def forget_mean(self) -> None:
        """The averaged gradient has changed: another pass adds to it, or it was thrown away."""
        self._has_read_mean = False

    def _squares_now(self) -> Tensor:
        """Of the averaged gradient that an engine will clip. Only trust ratios ask whether it has been changed."""
        return self._squares(self._norms_now) if self.is_managed and self._trust is not None else self._squares_of_mean

    def _squares(self, norms: SquaredNorms) -> Tensor:
        return squared_norms(self.binding.layout.gradients(), norms)

    # -- plain PyTorch ------------------------------------------------------------------------------------------------

    def _before_plain_pass(self) -> None:
        # Gradients may have been set to None without this optimizer's zero_grad(), for example by model.zero_grad().
        thrown_away = [i for i in self.hooks.reached() if self.parameters[i].grad is None]
        if thrown_away:
            self.hooks.forget(thrown_away)
        if self.schedule.updates == 0:
            self._refuse_changed_gradients()
        elif self.schedule.updates == 1 and self.hooks.passes == 0:
            self._warn_of_old_gradients()
        if self.hooks.passes == 0:
            self._follow()

    def _follow(self) -> None:
        """Bind anew if the model was moved since construction, as accelerate does, or torch.distributed was started."""
        group, first = self._plain_group(), self.parameters[0]
        if first.dtype != self._dtype:
            require_supported(self.parameters)
            self._dtype = first.dtype
        if first.device == self._device and group is self.binding.group:
            return
        saved, before = checkpoint.to_dict(self.schedule), self.schedule.clock
        self._bind_plain()
        checkpoint.load(self.schedule, saved)
        first_n = None if before.first_n is None else before.first_n.to(self._device)
        self.schedule.clock = replace(self.schedule.clock, is_resumed=before.is_resumed, first_n=first_n)

    def _refuse_changed_gradients(self) -> None:
        """In the first update: a change between two of its passes is in the average, and not in what is measured."""
        for i, version in self._versions.items():
            gradient = self.parameters[i].grad
            if self.hooks.last_pass[i] and gradient is not None and (id(gradient), gradient._version) != version:
                raise UnsupportedError(
                    f'LENA: the gradient of "{self.names[i]}" was changed between two backward passes of one update, '
                    "as by clip_grad_norm_() after each of them. LENA measures what each pass adds. Change gradients "
                    "after the last pass, or by register_hook(). To throw them away call optimizer.zero_grad()."
                )

    def _warn_of_old_gradients(self) -> None:
        if any(p.grad is not None and bool(p.grad.any()) for p in self.parameters):
            logger.warning(
                "LENA: the gradients of the update before are still there, and this one's are added to them. Call "
                "optimizer.zero_grad() after step(); otherwise LENA takes the sum for the gradient of this update."
            )

    def _plain_group(self) -> Group | None:
        return default_group() if self._group is None else self._group

    def _after_plain_pass(self) -> None:
        self._read_mean_later(_CALLBACKS_TO_WAIT)

    def _read_mean_later(self, turns: int) -> None:
        if turns:
            backward.when_task_ends(lambda: self._read_mean_later(turns - 1))
            return
        with torch.no_grad():
            self.read_mean()
            if self.schedule.updates == 0:
                grads = {i: p.grad for i, p in enumerate(self.parameters) if p.grad is not None}
                self._versions = {i: (id(grad), grad._version) for i, grad in grads.items()}
            if not self._ranks_agree:
                self._trace = trace_of((p.grad for p in self.parameters if p.grad is not None), self._device)

    def require_agreement(self) -> None:
        """Raise `StateError` if the ranks hold other parameters or gradients. Before the first update, in plain PyTorch
        on many ranks.
        """
        if not self._ranks_agree:
            told = [(placement.name, tuple(placement.shape)) for placement in self.binding.placements]
            keys = self.config.compared()
            require_agreement((keys, self._watched.left_out, told), self._trace, self.binding.group)

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
            for pattern in unmatched_patterns(self._all_names, getattr(self.config, key)):
                if (key, pattern) not in self._warned_of_patterns:  # a client LENA gets its engine's names, too
                    self._warned_of_patterns.add((key, pattern))
                    logger.warning(
                        'LENA: "%s": the pattern "%s" matches no parameter. The nearest name is "%s".',
                        key,
                        pattern,
                        nearest_name(self._all_names, pattern),
                    )


def _weakly(method: Callable[[], None]) -> Callable[[], None]:
    """A call of a method that does not keep its object: a dropped optimizer is freed at once, and its hooks with it."""
    reference = weakref.WeakMethod(method)

    def call() -> None:
        alive = reference()
        if alive is not None:
            alive()

    return call
