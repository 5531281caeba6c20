"""A few draws in every run, and those that once found something. `python -m tests.fuzz` runs any number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fuzz.draws import IN_FORWARD, Draw, draw
from tests.fuzz.judge import Verdict, judge
from tests.helpers.case import Window
from tests.integrations._ranks import Ranks

SEEDS = range(20)
TWO = {"windows": (Window(2), Window(2)), "events": ("none", "none")}
FOUND = [
    # DeepSpeed lost the gradient, and LENA counted it.
    Draw(stage=1, precision="bf16-fp32", features=("fused loss",), **TWO, refused=IN_FORWARD),  # type: ignore[arg-type]
    # DeepSpeed leaves out a parameter without elements, which was never seen to be thrown away: n was too large.
    Draw(stage=0, precision="bf16", features=("empty",), windows=(Window(2),), events=("thrown away",)),
    # The reference forgot that the base batch is a number of samples.
    Draw(stage=0, windows=(Window(2), Window(2, size=4)), events=("none", "none")),
]
"""Draws that were findings before what they showed was mended."""

DRAWS = sorted([*map(draw, SEEDS), *FOUND], key=lambda drawn: drawn.world)


@pytest.fixture(scope="module")
def verdict_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Draw], Verdict]]:
    """Judge a draw; all that have the same number of ranks run in the same ranks."""
    folder: Path = tmp_path_factory.mktemp("fuzz")
    ranks: dict[int, Ranks] = {}
    verdicts: dict[str, Verdict] = {}

    def verdict(drawn: Draw) -> Verdict:
        if drawn.world not in ranks:
            ranks[drawn.world] = Ranks(folder, drawn.world)
        if repr(drawn) not in verdicts:
            verdicts[repr(drawn)] = judge(drawn, ranks[drawn.world], folder)
        return verdicts[repr(drawn)]

    yield verdict
    for each in ranks.values():
        each.stop()


@pytest.mark.parametrize("drawn", DRAWS, ids=[f"{number}" for number in range(len(DRAWS))])
def test_a_draw_is_exact_or_refused(drawn: Draw, verdict_of: Callable[[Draw], Verdict]) -> None:
    verdict = verdict_of(drawn)
    assert verdict.kind in ("exact", "refused", "not run by DeepSpeed"), f"{drawn}\n{verdict.text}"


def test_most_draws_are_exact(verdict_of: Callable[[Draw], Verdict]) -> None:
    kinds = [verdict_of(drawn).kind for drawn in DRAWS]
    assert kinds.count("exact") > len(DRAWS) / 2
    assert kinds.count("not run by DeepSpeed") < len(DRAWS) / 10


def test_a_draw_prints_itself_as_the_call_that_makes_it() -> None:
    for drawn in DRAWS:
        assert eval(repr(drawn), {"Draw": Draw, "Window": Window}) == drawn
