"""The ranks of the session, and what the runs of HF's Trainer came to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integrations._examples import write_texts
from tests.integrations._programs import SCRIPTS, launch
from tests.integrations._ranks import WORLD, Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(tmp_path_factory.mktemp("ranks"))
    yield started
    started.stop()


@pytest.fixture(scope="session")
def hf_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    """The results of a run of scripts/hf_trainer.py in the order of ranks; all its runs are launched once, together."""
    folder = tmp_path_factory.mktemp("hf")
    launch(str(SCRIPTS / "hf_trainer.py"), str(folder))
    return lambda name: [json.loads((folder / f"{name}.rank{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with `texts.txt` for the examples; what the data libraries keep of it goes there too."""
    folder = tmp_path_factory.mktemp("examples")
    write_texts(folder / "texts.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        yield folder
