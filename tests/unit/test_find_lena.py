"""`report` finds the LENA inside of what it is given."""

from types import SimpleNamespace

import pytest

import ds_lena
from ds_lena import LENA, StateError
from ds_lena.reporting import find_lena
from tests.unit.support import weights


@pytest.mark.parametrize(
    "wrap",
    [
        lambda lena: lena,
        lambda lena: SimpleNamespace(optimizer=lena),
        lambda lena: SimpleNamespace(optimizer=SimpleNamespace(optimizer=lena)),
        lambda lena: SimpleNamespace(basic_optimizer=lena, optimizer="a wrapper"),
        lambda lena: SimpleNamespace(deepspeed=SimpleNamespace(basic_optimizer=lena), optimizer=None),
    ],
    ids=["LENA", "wrapper", "wrapper of a wrapper", "engine", "Trainer"],
)
def test_lena_is_found(wrap):
    lena = LENA(weights(2))
    assert find_lena(wrap(lena)) is lena
    assert ds_lena.report(wrap(lena)) == ds_lena.report(lena)


def test_a_circle_of_wrappers_is_no_trap():
    circle = SimpleNamespace()
    circle.optimizer = circle
    assert find_lena(circle) is None


def test_where_there_is_no_lena_the_error_says_what_to_pass():
    with pytest.raises(StateError, match=r"no LENA optimizer in SimpleNamespace.*Pass an engine, a Trainer"):
        ds_lena.report(SimpleNamespace(optimizer=object()))
