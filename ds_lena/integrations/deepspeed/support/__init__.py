"""The table of what is supported, a row per feature. docs/support.md is made from it.

A feature is supported by a file of the package, or it is refused with the nearest supported choice, or it has no effect
on LENA. Every key of DeepSpeed's JSON is in one of the three: `tests/integrations/test_every_key.py` asks DeepSpeed.
"""

from __future__ import annotations

from ....errors import UnsupportedError
from .._internals.facts import EngineFacts
from .refused import REFUSED
from .supported import STAGES, SUPPORTED
from .without_effect import WITHOUT_EFFECT

__all__ = ["FEATURES", "REFUSED", "STAGES", "SUPPORTED", "WITHOUT_EFFECT", "in_use", "refuse_unsupported"]

FEATURES = SUPPORTED + REFUSED


def in_use(facts: EngineFacts) -> list[str]:
    """The supported features that an engine uses: its ZeRO stage and precision first."""
    return [feature.what for feature in SUPPORTED if feature.is_on(facts)]


def refuse_unsupported(facts: EngineFacts, who: str = "LENA") -> None:
    """Raise `UnsupportedError` for the first refused feature that is on, or for a stage that is not in the table."""
    for feature in REFUSED:
        if feature.is_on(facts):
            what = feature.what.format(predivide=facts.predivide)
            raise UnsupportedError(f"{who} does not support {what}. Nearest supported choice: {feature.instead}.")
    if not any(feature.is_on(facts) for feature in STAGES):
        raise UnsupportedError(
            f"{who} does not support ZeRO {facts.stage} with these types of weights and gradients. Nearest supported "
            f"choice: one of {'; '.join(feature.what for feature in STAGES)}."
        )
