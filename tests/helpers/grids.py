"""DeepSpeed keeps its groups of ranks, and how it splits models, in modules: put back what one engine has set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_grid() -> Iterator[None]:
    """Put back what the engines made within it have set there."""
    from deepspeed.module_inject.layers import set_autotp_mode
    from deepspeed.runtime import torch_autocast
    from deepspeed.utils import groups

    modules = (groups, torch_autocast)
    before = [dict(vars(module)) for module in modules]
    try:
        yield
    finally:
        set_autotp_mode(training=False)
        for module, names in zip(modules, before, strict=True):
            vars(module).update(names)
