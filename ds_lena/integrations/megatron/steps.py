"""The count of updates, for an inner optimizer of Megatron that keeps it in its groups.

torch's optimizers, and LENA, keep `step` in the state of each tensor. FusedAdam of Transformer Engine and of Apex keeps
a number in each group, and Megatron's checkpoints read it there.
"""

from __future__ import annotations

import torch

from ...optimizer import LENA


class StepInGroups:
    """Moves the count from the groups into the state for the time of an update, and back."""

    def __init__(self, lena: LENA) -> None:
        self._lena = lena

    def lend(self) -> None:
        """Before an update."""
        for group in self._lena.param_groups:
            for parameter in group["params"]:
                count = float(group.get("step", 0))
                self._lena.state[parameter]["step"] = torch.full((), count, device=parameter.device)

    def take_back(self, applied: bool) -> None:
        """After an update."""
        for group in self._lena.param_groups:
            for parameter in group["params"]:
                self._lena.state[parameter].pop("step", None)
            if group["params"] and applied:
                group["step"] = int(group.get("step", 0)) + 1
