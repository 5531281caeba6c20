"""The ranks of the session, and programs that run in processes of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integrations._ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(tmp_path_factory.mktemp("ranks"))
    yield started
    started.stop()
