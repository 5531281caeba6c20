"""The count of updates, where Megatron expects it in the groups of the inner optimizer.

torch's optimizers, and LENA, keep `step` in the state of each tensor. FusedAdam of Transformer Engine and of Apex keeps
a number in each group. Megatron's distributed optimizer is made for that: without these libraries it reads `step` in a
`state_dict()`, and fails to load a checkpoint into a state that has it.
"""

from __future__ import annotations

from typing import Any

import torch

from ...optimizer import LENA


class StepInGroups:
    """Keeps the count in the groups. It is in the state only for the time of an update.

    `shows_in_state`: a `state_dict()` has it in the state, too, as Megatron reads it of torch's optimizers.
    """

    def __init__(self, lena: LENA, shows_in_state: bool) -> None:
        self._lena = lena
        self._move_to_groups()
        lena.register_load_state_dict_post_hook(lambda _: self._move_to_groups())
        if shows_in_state:
            lena.register_state_dict_post_hook(lambda _, packed: _show(packed))

    def _move_to_groups(self) -> None:
        for group in self._lena.param_groups:
            known = [self._lena.state[p].pop("step", None) for p in group["params"] if p in self._lena.state]
            found = [count for count in known if count is not None]
            if "step" not in group:
                group["step"] = int(found[0]) if found else 0

    def lend(self) -> None:
        """Before an update."""
        for group in self._lena.param_groups:
            if group["params"]:
                counts = torch.full((len(group["params"]),), float(group["step"]), device=group["params"][0].device)
                for parameter, count in zip(group["params"], counts.unbind(), strict=True):
                    self._lena.state[parameter]["step"] = count

    def take_back(self, applied: bool) -> None:
        """After an update."""
        for group in self._lena.param_groups:
            for parameter in group["params"]:
                self._lena.state[parameter].pop("step", None)
            group["step"] = int(group["step"]) + applied


def _show(packed: dict[str, Any]) -> None:
    """Into a `state_dict()` (modified in place, without what is live)."""
    for group in packed["param_groups"]:
        for number in group["params"]:
            count = torch.tensor(float(group["step"]))
            packed["state"][number] = {**packed["state"].get(number, {}), "step": count}
