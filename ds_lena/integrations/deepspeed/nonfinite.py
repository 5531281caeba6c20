"""An update that is not finite, at ZeRO 0 in fp32: DeepSpeed does not look there, and LENA has measured it."""

from __future__ import annotations

import logging

from ...optimizer import LENA
from ...schedule.schedule import Proposal

logger = logging.getLogger("ds_lena")


class Nonfinite:
    """Skips such updates of one engine, or says so. `lena.overflow`: what DeepSpeed and accelerate call a skipped one.

    `choice`: the key `"nonfinite"`.
    """

    def __init__(self, lena: LENA, choice: str) -> None:
        self._lena, self._skips, self._has_told = lena, choice == "skip", False
        lena.overflow = False

    def look(self, proposal: Proposal) -> None:
        """Look at an update before it is applied. It waits for the device, as DeepSpeed does with a wrapper."""
        is_bad = not bool(proposal.measured.finite.all())
        self._lena.overflow = is_bad and self._skips
        if is_bad and not self._has_told:
            self._has_told = True
            done = "is skipped, and so are later ones" if self._skips else "is applied, and spoils the weights"
            logger.warning(
                'LENA: the gradient of update %d is infinite or NaN. The update %s ("nonfinite": "%s").',
                proposal.clock.updates,
                done,
                "skip" if self._skips else "warn",
            )
