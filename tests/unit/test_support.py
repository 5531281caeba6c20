"""The table of what is supported: every row is whole, and what it names is there."""

from pathlib import Path

import pytest

import ds_lena
from ds_lena.integrations.deepspeed.support import FEATURES

PACKAGE = Path(ds_lena.__file__).parent
FEATURE = pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.what)


@FEATURE
def test_a_feature_is_supported_by_a_file_or_refused_with_advice(feature):
    assert bool(feature.by) != bool(feature.instead)
    assert not feature.by or (PACKAGE / feature.by).is_file()


@FEATURE
def test_the_test_that_shows_it_is_there(feature):
    file, _, name = feature.test.partition("::")
    text = (PACKAGE.parent / file).read_text()
    assert f"def {name}(" in text if name else "def test_" in text


def test_no_feature_stands_twice():
    names = [feature.what for feature in FEATURES]
    assert len(set(names)) == len(names)
