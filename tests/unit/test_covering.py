"""The parity matrix: the cases that are left out hold no four values that no case has."""

from itertools import combinations

import pytest

from tests.helpers.covering import all_rows
from tests.parity.test_matrix import PAIRS, QUARTER, VALUES, exists, measures


@pytest.mark.parametrize(
    ("cases", "valid", "together"), [(PAIRS, measures, 2), (QUARTER + PAIRS, exists, 4)], ids=["default", "full"]
)
def test_every_so_many_values_occur_together(cases, valid, together):
    def held(rows):
        return {some for row in rows for some in combinations(row.items(), together)}

    assert held(all_rows(VALUES, valid)) <= held(cases)
