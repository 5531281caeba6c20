"""Parameters that were frozen when the engine was made. LENA does not train them if they are unfrozen later."""

from __future__ import annotations

import logging
from collections.abc import Collection

from torch import nn

from ...errors import StateError
from ...layers import named_parameters

logger = logging.getLogger("ds_lena")

_WHAT_TO_DO = "To train it call destroy() on this engine, and give the model to a new one."


class Frozen:
    """The frozen parameters of a model. `held`: the ids of the parameters in the optimizer's groups."""

    def __init__(self, model: nn.Module, held: Collection[int]) -> None:
        self._frozen = [(name, parameter) for name, parameter in named_parameters(model) if not parameter.requires_grad]
        self._held = held

    def look(self) -> None:
        """Called once per update. It waits for nothing, and warns once.

        Raises:
            StateError: a parameter in the optimizer's groups was unfrozen.
        """
        found = next(((name, parameter) for name, parameter in self._frozen if parameter.requires_grad), None)
        if found is None:
            return
        name, parameter = found
        if id(parameter) in self._held:
            raise StateError(f'LENA: "{name}" was frozen at deepspeed.initialize and is not now. {_WHAT_TO_DO}')
        self._frozen = []
        logger.warning(
            'LENA: "%s" was frozen at deepspeed.initialize and is not now. This engine does not train it, with any '
            "optimizer. %s",
            name,
            _WHAT_TO_DO,
        )
