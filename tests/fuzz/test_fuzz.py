"""A few draws in every run, and those that once found something. `python -m tests.fuzz` runs any number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fuzz.draws import Draw, draw
from tests.fuzz.judge import Verdict, judge
from tests.integrations._ranks import Ranks

SEEDS = range(20)
FOUND: list[Draw] = []
"""Draws that were findings before what they showed was mended."""

DRAWS = sorted([*map(draw, SEEDS), *FOUND], key=lambda drawn: drawn.world)


@pytest.fixture(scope="module")
def verdict_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Draw], Verdict]]:
    """Judge a draw; all that have the same number of ranks run in the same ranks."""
    folder: Path = tmp_path_factory.mktemp("fuzz")
    ranks: dict[int, Ranks] = {}

    def verdict(drawn: Draw) -> Verdict:
        if drawn.world not in ranks:
            ranks[drawn.world] = Ranks(folder, drawn.world)
        return judge(drawn, ranks[drawn.world], folder)

    yield verdict
    for each in ranks.values():
        each.stop()


@pytest.mark.parametrize("drawn", DRAWS, ids=repr)
def test_a_draw_is_exact_or_refused(drawn: Draw, verdict_of: Callable[[Draw], Verdict]) -> None:
    verdict = verdict_of(drawn)
    assert verdict.kind in ("exact", "refused", "not run by DeepSpeed"), verdict.text


def test_a_draw_prints_itself_as_the_call_that_makes_it() -> None:
    from tests.helpers.case import Window

    for drawn in DRAWS:
        assert eval(repr(drawn), {"Draw": Draw, "Window": Window}) == drawn
