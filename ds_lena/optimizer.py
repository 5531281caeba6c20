"""`LENA`, a torch optimizer that scales the learning rate layer by layer. `controller.py` runs its updates."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from itertools import count
from typing import Any

import torch
from torch import Tensor

from .binding import Watched
from .config import LenaConfig, check_group, group_keys
from .controller import Controller
from .errors import StateError, UnsupportedError
from .grad_stats.reduce import Group
from .layers import canonical_names
from .parameters import require_supported, split_names
from .schedule import checkpoint

logger = logging.getLogger("ds_lena")

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


def train_in_plain_pytorch(parameters: Iterable[Tensor]) -> bool:
    """Whether a LENA in plain PyTorch, which no engine manages, holds one of these parameters."""
    wanted = {id(parameter) for parameter in parameters}
    controllers = [controller_of(lena) for lena in _instances]
    return any(not c.is_managed and any(id(p) in wanted for p in c.parameters) for c in controllers)


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
        self._controller = Controller(
            self.config,
            self._watched(names),
            None if process_group is _UNSET else process_group,
            process_group is not _UNSET,
        )
        _instances.add(self)

    def _watched(self, names: dict[int, str]) -> Watched:
        everything = [(p, i) for i, group in enumerate(self.param_groups) for p in group["params"]]
        given = canonical_names([names[id(p)] for p, _ in everything]) if names else map("param_{}".format, count())
        found = [(p, i, name) for (p, i), name in zip(everything, given, strict=False) if p.requires_grad]
        require_supported([p for p, _, _ in found])
        return Watched(
            parameters=[p for p, _, _ in found],
            names=[name for _, _, name in found],
            has_names=bool(names),
            groups_of=[i for _, i, _ in found],
            left_out=[not self.param_groups[i].get("lena", True) for _, i, _ in found],
            lr_at_start=[float(group["lr"]) for group in self.param_groups],
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
                raise StateError("LENA: optimizer.step() was called directly. Under DeepSpeed call engine.step().")
            controller.apply(self.param_groups, self.state)
        elif any(p.grad is not None for p in controller.parameters):
            self._refuse_grad_scaler()
            controller.hooks.require_passes()
            controller.begin_update(self.param_groups, self.state)
            controller.apply(self.param_groups, self.state)
            controller.end_update(applied=True)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch does. In plain PyTorch it also throws away the statistics of the window."""
        super().zero_grad(set_to_none)
        if not self._controller.is_managed:
            self._controller.hooks.clear()

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """torch's `state_dict` and, under "lena", LENA's own state: plain numbers by layer name, O(L)."""
        return {**super().state_dict(), "lena": checkpoint.to_dict(self._controller.schedule)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict()`. One without "lena", of AdamW say, keeps its moments and starts LENA fresh."""
        saved = state_dict.get("lena")
        if saved is not None:
            checkpoint.require_loadable(saved, self.config)
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "lena"})
        for parameter, state in self.state.items():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(parameter.device, torch.float32)
        if saved is None:
            logger.warning("LENA: the checkpoint holds no LENA state; statistics and warm-up start fresh.")
            return
        checkpoint.load(self._controller.schedule, saved)

    _step_supports_amp_scaling = True  # so torch.amp.GradScaler sets found_inf, by which it is recognized

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
