"""`LENA`, a torch optimizer that scales the learning rate layer by layer. `controller.py` runs its updates."""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from itertools import count
from typing import Any, ParamSpec

import torch
from torch import Tensor

from .binding import Watched
from .config import LenaConfig, check_group
from .controller import Controller
from .errors import StateError, UnsupportedError
from .grad_stats.reduce import Group
from .keys import group_keys
from .layers import canonical_names
from .parameters import read_names, require_supported
from .schedule import carrier, checkpoint

logger = logging.getLogger("ds_lena")

P = ParamSpec("P")
_UNSET: Any = object()
_instances: weakref.WeakSet[LENA] = weakref.WeakSet()
_dormant: ContextVar[bool] = ContextVar("ds_lena_dormant", default=False)


@contextlib.contextmanager
def dormant() -> Iterator[None]:
    """Within it `LENA.step()` does nothing. Some wrappers call it at construction, with gradients of zeros."""
    token = _dormant.set(True)
    try:
        yield
    finally:
        _dormant.reset(token)


def controller_of(lena: LENA) -> Controller:
    """The controller of an optimizer. It is for integrations, and not part of the user's interface."""
    return lena._controller


def watch_anew(lena: LENA) -> None:
    """Watch the parameters that need a gradient now, before an engine takes over. Names come from the engine.

    Parameters may have been frozen, unfrozen or replaced since construction.

    Raises:
        StateError: an engine has taken over before. It has put tensors of its own into the groups.
    """
    if lena._controller.is_managed:
        raise StateError(
            "LENA: this optimizer belongs to a DeepSpeed engine that was made before, and its groups hold the tensors "
            "of that engine. Make a new LENA for the new engine; a checkpoint of the old engine can be loaded into it."
        )
    now = [id(p) for group in lena.param_groups for p in group["params"] if p.requires_grad]
    if now != [id(p) for p in lena._controller.parameters]:
        lena._controller.close()
        lena._controller = Controller(lena._config, lena._watched({}), None)


def train_in_plain_pytorch(parameters: Iterable[Tensor]) -> bool:
    """Whether a LENA in plain PyTorch, which no engine manages, holds one of these parameters."""
    wanted = {id(parameter) for parameter in parameters}
    controllers = [controller_of(lena) for lena in _instances]
    return any(not c.is_managed and not wanted.isdisjoint(c.parameter_ids) for c in controllers)


def _reads_keys(init: Callable[P, None]) -> Callable[P, None]:
    """Have the keys checked as they were written, before `init`, which lists them for readers and their tools.

    `init` itself cannot tell a key that was left out from one given at its default, and Python's error for an unknown
    one does not name the nearest.
    """

    @functools.wraps(init)
    def read(self: LENA, params: Iterable[Any], lr: Any = _UNSET, *, process_group: Any = None, **keys: Any) -> None:
        self._config = LenaConfig.from_keys(keys if lr is _UNSET else {"lr": lr, **keys})
        init(self, params, process_group=process_group)  # type: ignore[arg-type]

    return read  # type: ignore[return-value]


class LENA(torch.optim.Optimizer):
    """Layer-wise scaling of the learning rate by gradient variance, with a warm-up that each layer ends by itself.

    Args:
        params: parameters, parameter groups, or `model.named_parameters()`. Groups may set their own `lr`,
            `weight_decay`, the base rule's keys, and `"lena": False` (factor 1, no statistics). Without names a layer
            is called `param_0`, `param_1`, … until an engine gives names.
        lr, …, variant: the keys of the JSON entry, see docs/keys.md. None for a key of some base rules only counts as
            not given.
        process_group: plain PyTorch only: the ranks over which gradients are averaged; None: all ranks.

    Method: Ko, Lee, Kim, WWW 2022, https://doi.org/10.1145/3485447.3511989; `schedule/algorithm.py` has the equations.

    Raises:
        ConfigError: a key or value is not allowed.
        UnsupportedError: parameters in a form for which LENA would not be exact.

    Saved in `state_dict()`: the base rule's state per parameter, and under "lena" the O(L) state by layer name. Not
    saved: the statistics of a window that is not finished. In plain PyTorch `torch.distributed.checkpoint.state_dict`
    keeps all of it.
    """

    _config: LenaConfig
    overflow: bool  # in an engine that skips updates: whether the one at hand is skipped

    @_reads_keys
    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        base: str = "adamw",
        weight_decay: float | None = None,
        betas: Sequence[float] | None = (0.9, 0.999),
        eps: float | None = 1e-8,
        momentum: float | None = 0.9,
        nesterov: bool | None = False,
        trust_coefficient: float | None = None,
        trust_clip: Sequence[float] | None = None,
        layer: str = "tensor",
        scaling: str = "gain",
        gain_power: float | None = None,
        max_relative_gain: float | None = 4.0,
        max_factor: float | None = None,
        smoothing: float | None = None,
        base_batch_size: float | None = None,
        micro_batch_size: float | None = None,
        warmup: str = "layer",
        warmup_fraction: float = 0.05,
        warmup_cap: float | None = 0.25,
        total_steps: float | None = None,
        exclude: Sequence[str] = (),
        no_decay: Sequence[str] = (),
        nonfinite: str = "skip",
        variant: str = "default",
        process_group: Group | None = None,
    ) -> None:
        config = self._config
        groups, names = read_names(params)
        super().__init__(groups, {key: getattr(config, key) for key in group_keys(config.base)})
        for group in self.param_groups:
            check_group(group, config)
        self._controller = Controller(config, self._watched(names), process_group)
        self._has_warned_of_no_gradient = False
        carrier.empty(self.param_groups, is_managed=False)
        _instances.add(self)

    def _watched(self, names: dict[int, str]) -> Watched:
        everything = [(p, i) for i, group in enumerate(self.param_groups) for p in group["params"]]
        given = canonical_names([names[id(p)] for p, _ in everything]) if names else map("param_{}".format, count())
        found = [(p, i, name) for (p, i), name in zip(everything, given, strict=False) if p.requires_grad]
        require_supported([p for p, _, _ in found], is_made_by_engine=_dormant.get())
        return Watched(
            parameters=[p for p, _, _ in found],
            names=[name for _, _, name in found],
            has_names=bool(names),
            groups_of=[i for _, i, _ in found],
            left_out=[not self.param_groups[i].get("lena", True) for _, i, _ in found],
            lr_at_start=[float(group["lr"]) for group in self.param_groups],
            group_sizes=[len(group["params"]) for group in self.param_groups],
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused after construction, since the layers are then known."""
        if hasattr(self, "_controller"):
            raise UnsupportedError(
                "LENA: add_param_group() after construction is not supported. Give all parameters, the frozen ones "
                "too, to a new LENA when what is trained changes; load the old one's state_dict() into it."
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Move the parameters. In plain PyTorch this is the whole update. Under an engine it is the last part of one.

        Raises:
            StateError: no backward pass made the gradients, or it was called outside an engine's own step.
            ConfigError: in plain PyTorch, at the first step: `total_steps` or `micro_batch_size` is needed.
        """
        if _dormant.get():
            return None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        controller = self._controller
        if controller.is_managed:
            if not controller.is_in_update:
                raise StateError(
                    "LENA: optimizer.step() was called directly. Under DeepSpeed call engine.step(), and in Megatron's "
                    "own loop step() of the optimizer that wrap() returned."
                )
            if not getattr(self, "overflow", False):
                controller.apply(self.param_groups, self.state)
            return loss
        self._refuse_unwatched()
        if not controller.parameters:
            controller.meter.require_agreement()  # so that the other ranks, which hold some, do not wait for this one
        elif any(p.grad is not None for p in controller.parameters):
            self._refuse_grad_scaler()
            if self._is_asked_for_state_alone():
                controller.make_state(self.param_groups, self.state)
                return loss
            controller.hooks.require_passes()
            controller.begin_update(self.param_groups, self.state)
            controller.apply(self.param_groups, self.state)
            controller.end_update(applied=True)
            controller.updated()
        else:
            self._warn_of_no_gradient()
            controller.meter.require_agreement()  # as above
        return loss

    def _is_asked_for_state_alone(self) -> bool:
        """Whether this is torch.distributed.checkpoint: it has state made by a first step with lr 0 and zero gradients.

        That step can move nothing, so it needs no statistics.
        """
        return (
            self._controller.hooks.passes == 0
            and not self.state
            and all(float(group["lr"]) == 0 for group in self.param_groups)
            and not any(bool(p.grad.any()) for p in self._controller.parameters if p.grad is not None)
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch does. In plain PyTorch it also throws away the statistics of the window."""
        super().zero_grad(set_to_none)
        if not self._controller.is_managed:
            self._controller.hooks.clear()

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """torch's `state_dict` and, under "lena", LENA's own state: plain numbers by layer name, O(L).

        In plain PyTorch every parameter group holds that state, too, as text: see `schedule/carrier.py`.
        """

        def add(_: torch.optim.Optimizer, packed: dict[str, Any]) -> None:
            packed["lena"] = checkpoint.to_dict(self._controller.schedule)
            if not self._controller.is_managed:
                carrier.fill(packed["param_groups"], packed["lena"])

        with self.register_state_dict_post_hook(add, prepend=True):  # the user's own hooks see all of it
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict()`. One without "lena", of AdamW say, keeps its moments and starts LENA fresh.

        Raises:
            StateError: a state or parameter groups that these keys cannot go on from; then nothing has changed.
        """
        saved: dict[str, Any] | None = None

        def check(_: torch.optim.Optimizer, given: dict[str, Any]) -> None:
            nonlocal saved
            saved = carrier.own_state(given)
            if saved is not None:
                checkpoint.require_loadable(saved, self._config)
            checkpoint.require_groups(given.get("param_groups"), self._config.base)

        def go_on(_: torch.optim.Optimizer) -> None:
            carrier.empty(self.param_groups, self._controller.is_managed)
            for parameter, state in self.state.items():
                if "step" in state:  # in a checkpoint of others it may be a number, or of another type or device
                    step = torch.as_tensor(state["step"], dtype=torch.float32, device=parameter.device)
                    state["step"] = step.clone()  # several parameters may have got the same tensor
            if saved is None:
                logger.warning("LENA: the checkpoint holds no LENA state; statistics and warm-up start fresh.")
            else:
                checkpoint.load(self._controller.schedule, saved)

        # After the user's hooks that may change what is loaded, and before those that look at the result.
        with (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(go_on, prepend=True),
        ):
            super().load_state_dict(state_dict)

    # -- checks -------------------------------------------------------------------------------------------------------

    _step_supports_amp_scaling = True  # so torch.amp.GradScaler sets found_inf, by which it is recognized

    def _refuse_unwatched(self) -> None:
        """Refuse a parameter with a gradient that LENA does not watch, which would stay as it is or be half right."""
        watched = self._controller.parameter_ids
        for number, group in enumerate(self.param_groups):
            for place, parameter in enumerate(group["params"]):
                if id(parameter) in watched or parameter.grad is None:
                    continue
                names = group.get("param_names")
                name = f'"{names[place]}"' if names else f"parameter {place} of group {number}"
                raise StateError(
                    f"LENA: {name}, of shape {tuple(parameter.shape)}, has a gradient and was not there or was frozen "
                    "when LENA was constructed. Construct LENA after the parameters have been replaced or unfrozen, "
                    "and load the old one's state_dict() into it."
                )

    def _warn_of_no_gradient(self) -> None:
        if self._controller.schedule.updates == 0 and not self._has_warned_of_no_gradient:
            self._has_warned_of_no_gradient = True
            logger.warning(
                "LENA: step() found no gradient in any of its parameters, and moved nothing. If the model was trained, "
                "its parameters were replaced after LENA was constructed, as FSDP and to_empty() do."
            )

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
