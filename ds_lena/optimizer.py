"""`LENA`, a torch optimizer with a learning rate scaled layer by layer: ties probe, layers, tracker and rule."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from itertools import count
from typing import Any

import torch
from torch import Tensor

from .config import LenaConfig, check_group, group_keys, unknown_total_steps
from .errors import StateError, UnsupportedError
from .layers import LayerTable, build_table, canonical_names, matches, unmatched_patterns
from .measure import Meter
from .parameters import require_supported, split_names
from .plain import PlainHost
from .probe import Probe
from .reduce import Group
from .rules import RULES
from .shards import Host, plan_flat
from .stepper import Stepper
from .tracker import Plan, Proposal, Tracker
from .trust import TrustRatios

logger = logging.getLogger("ds_lena")

_UNSET: Any = object()
_instances: weakref.WeakSet[LENA] = weakref.WeakSet()
_dormant: ContextVar[bool] = ContextVar("ds_lena_dormant", default=False)


@contextlib.contextmanager
def dormant() -> Iterator[None]:
    """Within it `LENA.step()` does nothing: for wrappers that call it at construction, with zero gradients."""
    token = _dormant.set(True)
    try:
        yield
    finally:
        _dormant.reset(token)


def train_in_plain_pytorch(parameters: Iterable[Tensor]) -> bool:
    """Whether a LENA that no engine has adopted holds one of these parameters."""
    wanted = {id(parameter) for parameter in parameters}
    return any(not lena._managed and any(id(p) in wanted for p in lena.parameters) for lena in _instances)


class LENA(torch.optim.Optimizer):
    """Layer-wise scaling of the learning rate by gradient variance, with a warm-up that each layer ends by itself.

    Args:
        params: parameters, parameter groups, or `model.named_parameters()`. Groups may set their own `lr`,
            `weight_decay`, the base rule's keys, and `"lena": False` (factor 1, no statistics). Without names a layer
            is called `param_0`, `param_1`, … until an engine gives names.
        process_group: plain PyTorch only: the ranks over which gradients are averaged; all ranks unless given.
        **keys: the keys of the JSON entry, see `config.KEYS`.

    Method: Ko, Lee, Kim, WWW 2022, https://doi.org/10.1145/3485447.3511989; `algorithm.py` has the equations.

    Raises:
        ConfigError: a key or value is not allowed.
        UnsupportedError: parameters in a form for which LENA would not be exact.

    Saved in `state_dict()`: the base rule's state per parameter, and under "lena" the O(L) state by layer name. Not
    saved: the statistics of a window that is not finished.
    """

    def __init__(self, params: Iterable[Any], *, process_group: Group | None = _UNSET, **keys: Any) -> None:
        self.config = LenaConfig.from_keys(keys)
        groups, names = split_names(params)
        defaults = {key: getattr(self.config, key) for key in group_keys(self.config.base)}
        super().__init__(groups, defaults)
        for group in self.param_groups:
            check_group(group, self.config)
        everything = [(p, group) for group in self.param_groups for p in group["params"]]
        self._has_names = bool(names)
        given = canonical_names([names[id(p)] for p, _ in everything]) if names else map("param_{}".format, count())
        watched = [(p, group, name) for (p, group), name in zip(everything, given, strict=False) if p.requires_grad]
        require_supported([p for p, _, _ in watched])
        self._groups_of = [i for i, group in enumerate(self.param_groups) for p in group["params"] if p.requires_grad]
        self._is_left_out = [not group.get("lena", True) for _, group, _ in watched]
        self._probe = Probe([p for p, _, _ in watched], [name for _, _, name in watched])
        self._host: Host = PlainHost(
            self._probe,
            self._follow_device,
            None if process_group is _UNSET else process_group,
            process_group is not _UNSET,
        )
        self._managed = False
        self._proposal: Proposal | None = None
        self._lr_at_start = [float(group["lr"]) for group in self.param_groups]
        self._warned_of_scheduler = False
        self._bind(self._probe.names, range(len(watched)))
        _instances.add(self)

    # -- layout -------------------------------------------------------------------------------------------------------

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that LENA watches, in the order of its groups."""
        return self._probe.parameters

    @property
    def parameter_names(self) -> list[str]:
        """Their names: the user's, an engine's, or `param_0`, `param_1`, … by their place in the groups."""
        return self._probe.names

    @property
    def has_trust_ratios(self) -> bool:
        """Whether the base rule has them: then it needs to know how gradients will be clipped."""
        return self._trust is not None

    def adopt(self, host: Host, names: Sequence[str], order: Sequence[int]) -> None:
        """Run in other surroundings from now on: an engine calls `begin_update` and `end_update` around `step`.

        `names[i]`: the name of parameter i in the user's model; `order`: parameter indices in the model's order.
        """
        self._host, self._managed, self._has_names = host, True, True
        self._bind(names, order)

    def _bind(self, names: Sequence[str], order: Sequence[int]) -> None:
        """Group the parameters into layers under these names and start with an empty state."""
        self._probe.names = list(names)
        self._probe.before_pass = self._probe.after_pass = None
        self._host.watch_passes(self._probe)
        left_out = [out or matches(n, self.config.exclude) for n, out in zip(names, self._is_left_out, strict=True)]
        numels = [self._host.shape(i).numel() for i in range(len(names))]
        table = build_table(
            [names[i] for i in order], [numels[i] for i in order], [left_out[i] for i in order], self.config.layer
        )
        of_parameter = [0] * len(names)
        for i, layer in zip(order, table.of_parameter, strict=True):
            of_parameter[i] = layer
        self._table = LayerTable(table.names, table.numel, tuple(of_parameter))
        self._device = self._probe.parameters[0].device if names else torch.device("cpu")
        self._probe.measure([not out for out in left_out])
        self._meter = Meter(self._probe, self._host, self._table, self._device)
        self.tracker = Tracker(self.config, self._table, self._device)
        self._make_rule(names)
        self._patterns_are_checked = False
        if self._has_names:
            self._warn_of_patterns(names)

    def _make_rule(self, names: Sequence[str]) -> None:
        """What moves the pieces: with one learning rate for each layer, or, with trust ratios, for each parameter."""
        rule = RULES[self.config.base]
        decays = [not matches(name, self.config.no_decay) for name in names]
        rates = self._table.of_parameter if rule.trust is None else range(len(names))
        plans = {flat: plan_flat(flat.numel(), cut, rates, decays) for flat, cut in self._host.segments()}
        self._stepper = Stepper(rule, plans)
        self._trust: TrustRatios | None = None
        if rule.trust is not None:
            self._trust = TrustRatios(
                rule,
                rule.trust,
                self.config,
                self._host,
                self._groups_of,
                decays,
                self._device,
            )

    def _follow_device(self) -> None:
        """In plain PyTorch the model may have been moved since construction, by accelerate say."""
        if self._probe.parameters[0].device != self._device:
            saved = self.tracker.state_dict()
            self._bind(self._probe.names, range(len(self._probe.names)))
            self.tracker.load_state_dict(saved)

    def _warn_of_patterns(self, names: Sequence[str]) -> None:
        self._patterns_are_checked = True
        for key in ("exclude", "no_decay"):
            for pattern in unmatched_patterns(names, getattr(self.config, key)):
                logger.warning(
                    'LENA: "%s": the pattern "%s" matches no parameter, such as "%s"', key, pattern, names[0]
                )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Not after construction: the layers are known from the start."""
        if hasattr(self, "_probe"):
            raise UnsupportedError(
                "LENA: add_param_group() after construction is not supported. Give all parameters, the frozen ones "
                "too, to a new LENA when what is trained changes; load the old one's state_dict() into it."
            )
        super().add_param_group(param_group)

    # -- one update ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def begin_update(self) -> Proposal:
        """Measure, and compute this update's factors. Before any clipping by the engine.

        One all-reduce, and a second one for a base rule with trust ratios.
        """
        self._stepper.forget_rates()
        self.look_at_scheduler()
        if not self._patterns_are_checked:
            self._warn_of_patterns(self._probe.names)
        measured, square_of_mean = self._meter.measure()
        self._proposal = self.tracker.propose(measured, self._plan())
        self._factor = self._proposal.factor
        if self._trust is not None:
            ratios = self._trust.measure(square_of_mean, self.param_groups, self.state)
            self._factor = self._factor[self._meter.of_parameter] * ratios
        return self._proposal

    def end_update(self, applied: bool) -> None:
        """The update was applied, or thrown away (then nothing of it stays)."""
        proposal, self._proposal = self._proposal, None
        self._probe.clear()
        if proposal is None:
            return
        if applied:
            self.tracker.commit(proposal)
        else:
            self.tracker.skip()

    def _plan(self) -> Plan:
        total_steps = self.config.total_steps or self._host.total_steps()
        if total_steps is None and self.config.warmup != "none":
            raise unknown_total_steps()
        known = self._host.micro_batch_size()
        given = self.config.micro_batch_size
        return Plan(total_steps, self._host.planned_n(), given if known is None else known)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Move the parameters. In plain PyTorch this is the whole update; under an engine only the moving.

        Raises:
            StateError: gradients that no backward pass made, or, under an engine, a call outside of its own step.
            ConfigError: plain PyTorch, first step: `total_steps` or `micro_batch_size` is needed and not given.
        """
        if _dormant.get():
            return None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._managed:
            if self._proposal is None:
                raise StateError("LENA: optimizer.step() was called directly. Under DeepSpeed call engine.step().")
            self._stepper.step(self.param_groups, self.state, self._factor)
            return loss
        if any(p.grad is not None for p in self._probe.parameters):
            self._refuse_grad_scaler()
            self._probe.require_passes()
            self.begin_update()
            self._stepper.step(self.param_groups, self.state, self._factor)
            self.end_update(applied=True)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; in plain PyTorch it also throws away the statistics of the window."""
        super().zero_grad(set_to_none)
        if not self._managed:
            self._probe.clear()

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """torch's `state_dict` and, under "lena", LENA's own state: plain numbers by layer name, O(L)."""
        return {**super().state_dict(), "lena": self.tracker.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict()`. One without "lena", of AdamW say, keeps its moments and starts LENA fresh."""
        saved = state_dict.get("lena")
        if saved is not None:
            self.tracker.require_loadable(saved)
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "lena"})
        for parameter, state in self.state.items():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(parameter.device, torch.float32)
        if saved is None:
            logger.warning("LENA: the checkpoint holds no LENA state; statistics and warm-up start fresh.")
            return
        self.tracker.load_state_dict(saved)

    # -- checks -------------------------------------------------------------------------------------------------------

    def look_at_scheduler(self) -> None:
        """Warn once of a scheduler that warms up too: before the first update its lr is below the one given."""
        if self._warned_of_scheduler or self.tracker.updates or self.config.warmup == "none":
            return
        for start, group in zip(self._lr_at_start, self.param_groups, strict=False):
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

    _step_supports_amp_scaling = True  # makes torch.amp.GradScaler show itself, see below

    def _refuse_grad_scaler(self) -> None:
        if getattr(self, "found_inf", None) is not None:
            raise UnsupportedError(
                "LENA: torch.amp.GradScaler is not supported: its changing loss scale would enter the statistics. "
                "Use bfloat16, which needs no loss scaling."
            )

    def __getstate__(self) -> dict[str, Any]:
        raise StateError(
            "LENA: the optimizer cannot be copied or pickled, since it is bound to its parameters by hooks. Save "
            "state_dict(), and load it into a LENA made for the other parameters."
        )

    def close(self) -> None:
        """Take LENA's hooks off the parameters."""
        self._probe.close()
