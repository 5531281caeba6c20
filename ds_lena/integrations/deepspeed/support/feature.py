"""What a row of the table of support says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .._internals.facts import EngineFacts

IsOn = Callable[[EngineFacts], bool]
Keys = tuple[str, ...]
"""Keys of DeepSpeed's JSON, with dots between the levels. `*` stands for any characters."""

PRECISIONS = ("fp32", "bf16", "bf16 with fp32 accumulation", "fp16")
"""The columns of the matrix of ZeRO stages."""


def not_a_fact(facts: EngineFacts) -> bool:
    """For a feature that an engine's facts do not show. Where it is refused, the code that meets it refuses it."""
    return False


@dataclass(frozen=True)
class Feature:
    """A feature that LENA supports or refuses.

    `what`: the name that an error uses. `is_on`: how to see that an engine uses it. `test`: the test that shows it.
    `by`: the file of the package that supports it. `instead`: the nearest supported choice, for a refused feature.
    `keys`: the keys that switch it on, or that have an effect only with it.
    `area`, `note`: for docs/support.md, in Markdown. An empty area is refused, or is in the matrix of ZeRO stages.
    """

    what: str
    is_on: IsOn
    by: str = ""
    instead: str = ""
    test: str = "tests/integrations/test_unsupported.py::test_it_is_refused_by_name_on_every_rank"
    keys: Keys = ()
    area: str = ""
    note: str = ""


@dataclass(frozen=True)
class WithoutEffect:
    """Keys that change nothing of what LENA measures, decides or moves. `because`: why not."""

    keys: Keys
    because: str
