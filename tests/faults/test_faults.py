"""Some faults in every run. `python -m tests.faults` draws any number of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.fault import Fault
from tests.faults.trial import trial
from tests.helpers.marks import rest

FAULTS = {
    Fault(place="backward"): {"equal"},
    Fault(place="all-reduce", next_world=1, next_stage=3): {"equal"},
    Fault(place="save", rank=0, one_tag=True): {"told"},
    Fault(place="after a file", rank=0, one_tag=True): {"told"},
    Fault(place="full disk"): {"told", "equal"},  # as rank 0 has named this checkpoint by then, or not
}


RARE = {
    Fault(place="read-only"): {"equal"},
    Fault(place="stall"): {"equal"},
}


@pytest.mark.parametrize("fault", rest(FAULTS | RARE, FAULTS), ids=lambda fault: f"{fault.place}-of-rank-{fault.rank}")
def test_a_run_goes_on_after_a_fault(fault: Fault, tmp_path: Path) -> None:
    assert trial(fault, tmp_path) in (FAULTS | RARE)[fault]
