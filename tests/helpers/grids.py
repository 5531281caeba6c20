"""DeepSpeed keeps its groups of ranks, and how it splits models, in modules: put back what one engine has set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def _put_back(module: ModuleType) -> Iterator[None]:
    before = {name: dict(value) if isinstance(value, dict) else value for name, value in vars(module).items()}
    try:
        yield
    finally:
        vars(module).update(before)


@contextmanager
def one_autocast() -> Iterator[None]:
    """Put back whether autocast is on."""
    from deepspeed.runtime import torch_autocast

    with _put_back(torch_autocast):
        yield


@contextmanager
def one_grid() -> Iterator[None]:
    """Put back all that the engines made within it have set there."""
    from deepspeed.module_inject.layers import set_autotp_mode
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from deepspeed.utils import groups

    with one_autocast(), _put_back(groups), _put_back(parallel_state_sp):
        try:
            yield
        finally:
            set_autotp_mode(training=False)
