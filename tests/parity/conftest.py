"""Runs the selected cases, one set of ranks per world size, when the first test of that size asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers.case import Case
from tests.helpers.launch import Outcome, launch


class Runs:
    """The outcomes of all selected cases, by name; a world size is launched once."""

    def __init__(self, selected: list[Case], folder: Path) -> None:
        self._selected = selected
        self._folder = folder
        self._outcomes: dict[str, Outcome] = {}

    def outcome(self, case: Case) -> Outcome:
        if case.name not in self._outcomes:
            together = [other for other in self._selected if other.world == case.world]
            outcomes = launch(together, self._folder / f"world{case.world}")
            self._outcomes |= {other.name: outcome for other, outcome in zip(together, outcomes, strict=True)}
        return self._outcomes[case.name]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The reference is made of small tensors: a second thread only costs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def run_case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Outcome]:
    """Run one case; those of the same world size that this session selected run in the same ranks."""
    parameters = [getattr(item, "callspec", None) for item in request.session.items]
    found = [entry.params.get("case") for entry in parameters if entry is not None]
    cases = [case for case in found if isinstance(case, Case)]
    unique = {case.name: case for case in cases}
    assert all(unique[case.name] == case for case in cases), "two different cases have the same name"
    return Runs(list(unique.values()), tmp_path_factory.mktemp("ranks")).outcome
