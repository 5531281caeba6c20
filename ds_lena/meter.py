"""Measure: everything between the backward passes and the statistics of one update, whatever the optimizer.

LENA's controller decides and moves by it, and `ds_lena.watch` only shows it. A meter is bound to plain PyTorch until an
engine takes over. In plain PyTorch a user may clip or unscale `p.grad` between backward and step. So the averaged
gradient is measured at the end of every backward pass, after DDP's reduction, and the last measurement before the step
counts. An engine says when its reduction has ended.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ParamSpec

import torch
from torch import Tensor

from .binding import Binding, plain_binding
from .errors import UnsupportedError
from .grad_stats import backward
from .grad_stats.agreement import require_agreement, require_average, trace_of
from .grad_stats.hooks import GradientHooks
from .grad_stats.measurement import Measurement
from .grad_stats.norms import SquaredNorms, squared_norms
from .grad_stats.reduce import Group, default_group, world_size
from .grad_stats.statistics import GradientStatistics
from .layers import LayerTable, Member, build_table, matches
from .parameters import require_supported

logger = logging.getLogger("ds_lena")

P = ParamSpec("P")

# DDP finishes its reduction in a callback at the end of backward. With static_graph that callback queues another one.
_CALLBACKS_TO_WAIT = 2


class Meter:
    """Measures the updates of `parameters`, which need a gradient, under the names `names`.

    `left_out[i]`: parameter i takes no part, beside those that match `exclude`. `layer`: what a layer is, see
    docs/keys.md. `group`: for plain PyTorch, the ranks that average the gradients. None is all ranks.
    `told`: what has to be the same on all ranks of plain PyTorch.
    `after_mean()`: called each time the averaged gradient was measured.
    `after_bind(keeps)`: called when the layers are known. `keeps`: they were known before, and stay the same.

    `binding`: describes what runs the updates. `is_managed`: an engine runs them. `table`: the layers.
    `updates`: applied updates that it has measured. `is_in_update`: one has begun and has not ended.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        names: Sequence[str],
        left_out: Sequence[bool],
        layer: str,
        exclude: Sequence[str],
        group: Group | None,
        told: object,
    ) -> None:
        self.parameters, self._left_out = parameters, left_out
        self.hooks = GradientHooks(parameters, names)
        self.is_managed = self.is_in_update = False
        self.updates = 0
        self.after_mean: Callable[[], None] = lambda: None
        self.after_bind: Callable[[bool], None] = lambda keeps: None
        self._layer, self._exclude, self._group, self._told = layer, exclude, group, told
        self._amend: Callable[[Binding], Binding] = lambda binding: binding
        self._dtype = parameters[0].dtype if parameters else torch.float32

    # -- what runs it -------------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """The names of the parameters, from the user or an engine, else `param_0`, `param_1`, …"""
        return self.hooks.names

    def amend_plain_binding(self, amend: Callable[[Binding], Binding]) -> None:
        """Change what plain PyTorch is bound to, now and whenever it is bound anew. Before the first update."""
        self._amend = amend
        self.bind_plain()

    def bind_plain(self, keeps: bool = False) -> None:
        """Bind to plain PyTorch: one process, or DDP."""
        self._bind(self._amend(plain_binding(self.parameters, self.hooks.names, self._plain_group())), keeps)

    def manage(self, binding: Binding) -> None:
        """Let an engine run the updates from now on."""
        self.is_managed = True
        self._bind(binding)

    def _bind(self, binding: Binding, keeps: bool = False) -> None:
        """Group the parameters into layers under the binding's names, and start a window."""
        self.binding = binding
        placements = binding.placements
        names = [placement.name for placement in placements]
        left_out = [out or matches(name, self._exclude) for name, out in zip(names, self._left_out, strict=True)]
        self.device = self.parameters[0].device if names else torch.device("cpu")
        self.table = self._layers(left_out)
        self.hooks.names = names
        # DDP with static_graph changes gradients at the end of its first pass, and before we hear of that end.
        self.hooks.unchanged_up_to = binding.layout.unchanged_up_to() if self.is_managed else 0
        self.hooks.refuses_changes = binding.layout.shows_changes()
        self.hooks.watch([not out for out in left_out], [placement.join for placement in placements], binding.parts)
        self.hooks.before_pass = None if self.is_managed else weakly(self._before_plain_pass)
        self.hooks.after_pass = None if self.is_managed else weakly(self._after_plain_pass)
        self._mean_norms = self.hooks.new_norms()
        self.squares_of_mean = self._mean_norms.read()
        self._has_read_mean = False
        self._versions: dict[int, tuple[int, int]] = {}
        self._statistics = GradientStatistics(
            placements, self.table.of_parameter, self.table.count, self._cells, binding.group, self.device
        )
        self._ranks_agree = self.is_managed or world_size(binding.group) == 1
        self._trace = trace_of((), self.device)
        self.after_bind(keeps)

    def _layers(self, left_out: Sequence[bool]) -> LayerTable:
        """The layers of all ranks in the order of the model; `of_parameter` in the order of the parameters."""
        placements = self.binding.placements
        own = [
            Member(placements[i].name, placements[i].shape.numel(), left_out[i], placements[i].spread)
            for i in self.binding.order
        ]
        members = self.binding.members_of_all(own)
        table = build_table(members, self._layer)
        layer_of = {member.name: layer for member, layer in zip(members, table.of_parameter, strict=True)}
        self.all_names = [member.name for member in members]
        spreads = zip(table.of_parameter, (member.spread for member in members), strict=True)
        self._cells = {(layer, spread) for layer, spread in spreads if layer < table.count}
        return replace(table, of_parameter=tuple(layer_of[placement.name] for placement in placements))

    # -- one update ---------------------------------------------------------------------------------------------------

    def begin_update(self) -> None:
        """Make sure that the averaged gradient is measured and, in the first update, that it is what it should be."""
        self.require_agreement()
        if self.is_managed and not self._has_read_mean:
            self.read_mean()
        if self.binding.check is not None and self.updates == 0:
            self.binding.check(self.squares_of_mean)
        self.is_in_update = True

    def reduced(self, squares_now: Tensor, sums: Tensor | None = None, passes: int | None = None) -> Tensor:
        """What `of` reads, by one all-reduce. `squares_now` (P,): of the averaged gradient as it may be by now.

        `sums`, `passes`: in place of those that the hooks have seen; then `squares_now` is that of their average.
        """
        if sums is None or passes is None:
            return self._statistics.reduced(self.hooks.passes, self.hooks.sums, self.squares_of_mean, squares_now)
        return self._statistics.reduced(passes, sums, squares_now, squares_now)

    def of(self, reduced: Tensor, loss_scale: Tensor | float) -> tuple[Measurement, Tensor]:
        """The statistics of each layer, and the squared norm () of the whole gradient. See `GradientStatistics.of`."""
        return self._statistics.of(reduced, loss_scale)

    def require_average(self, measured: Measurement) -> None:
        """In the first update of plain PyTorch on several ranks: raise `StateError` if no average was measured."""
        if not self._ranks_agree:
            require_average(measured.mean_square.sum(), measured.square_of_mean.sum())
            self._ranks_agree = True

    def end_update(self, applied: bool) -> None:
        """End the update, or throw away what was seen without one."""
        self.forget_mean()
        self.hooks.clear()
        self.hooks.unchanged_up_to = self.binding.layout.unchanged_up_to()
        if self.binding.layout.mends:
            self.binding.layout.clear_gradients()
        self.updates += applied and self.is_in_update
        self.is_in_update = False

    @torch.no_grad()
    def read_mean(self) -> None:
        """Measure the averaged gradient, at the end of a backward pass that has reduced it. The last time counts.

        What a user makes of it later moves the weights, and is not in the statistics.
        """
        self.squares_of_mean = self.squares(self._mean_norms)
        self._has_read_mean = True
        self.after_mean()

    def forget_mean(self) -> None:
        """The averaged gradient has changed: another pass adds to it, or it was thrown away."""
        self._has_read_mean = False

    def squares(self, norms: SquaredNorms) -> Tensor:
        """(P,): this rank's share of the squared norms of the averaged gradient, as it is now."""
        return squared_norms(self.binding.layout.gradients(), norms)

    # -- plain PyTorch ------------------------------------------------------------------------------------------------

    def _before_plain_pass(self) -> None:
        # Gradients may have been set to None without this optimizer's zero_grad(), for example by model.zero_grad().
        thrown_away = [i for i in self.hooks.reached() if self.parameters[i].grad is None]
        if thrown_away:
            self.hooks.forget(thrown_away)
        if self.updates == 0:
            self._refuse_changed_gradients()
        elif self.updates == 1 and self.hooks.passes == 0:
            self._warn_of_old_gradients()
        if self.hooks.passes == 0:
            self._follow()

    def _follow(self) -> None:
        """Bind anew if the model was moved since construction, as accelerate does, or torch.distributed was started."""
        group, first = self._plain_group(), self.parameters[0]
        if first.dtype != self._dtype:
            require_supported(self.parameters)
            self._dtype = first.dtype
        if first.device == self.device and group is self.binding.group:
            return
        self.bind_plain(keeps=True)

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
            if self.updates == 0:
                grads = {i: p.grad for i, p in enumerate(self.parameters) if p.grad is not None}
                self._versions = {i: (id(grad), grad._version) for i, grad in grads.items()}
            if not self._ranks_agree:
                self._trace = trace_of((p.grad for p in self.parameters if p.grad is not None), self.device)

    def require_agreement(self) -> None:
        """Raise `StateError` if the ranks hold other parameters or gradients. Before the first update, in plain PyTorch
        on many ranks.
        """
        if not self._ranks_agree:
            told = [(placement.name, tuple(placement.shape)) for placement in self.binding.placements]
            require_agreement((self._told, self._left_out, told), self._trace, self.binding.group)


def weakly(method: Callable[P, None]) -> Callable[P, None]:
    """A call of a method that does not keep its object: a dropped optimizer is freed at once, and its hooks with it."""
    reference = weakref.WeakMethod(method)

    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        alive = reference()
        if alive is not None:
            alive(*args, **kwargs)

    return call
