"""Runs the selected cases, one set of ranks per world size and device, when the first test asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread

import pytest
import torch

from tests.helpers.case import Case
from tests.helpers.check import reference
from tests.helpers.launch import Outcome, launch
from tests.helpers.nvme import why_not_on_nvme


class Runs:
    """The outcomes of all selected cases, by name; a world size is launched once for each device."""

    def __init__(self, selected: list[Case], folder: Path) -> None:
        self._selected = [case for case in selected if case.device == "cpu" or torch.cuda.is_available()]
        if any(case.is_on_nvme for case in selected) and why_not_on_nvme():
            self._selected = [case for case in self._selected if not case.is_on_nvme]
        self._folder = folder
        self._outcomes: dict[str, Outcome] = {}

    def outcome(self, case: Case) -> Outcome:
        if not self._outcomes:
            self._launch_all()
        return self._outcomes[case.name]

    def _launch_all(self) -> None:
        """References are made meanwhile, first beside the single rank, which leaves cores idle."""
        references = Thread(target=lambda: [reference(case) for case in self._selected], daemon=True)
        references.start()
        for world, device in sorted({(case.world, case.device) for case in self._selected}):
            together = [case for case in self._selected if (case.world, case.device) == (world, device)]
            outcomes = launch(together, self._folder / f"world{world}-{device}")
            self._outcomes |= {case.name: outcome for case, outcome in zip(together, outcomes, strict=True)}
        references.join()


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
