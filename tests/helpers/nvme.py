"""The optimizer on NVMe: whether DeepSpeed can have it there, and what a tiny model needs for it."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from tests.helpers.case import Case

COMPILE = "from deepspeed.ops.op_builder import AsyncIOBuilder; AsyncIOBuilder().load()"
LEAST = 1024  # bytes in a request of DeepSpeed's: it must be whole blocks of a disk


@functools.cache
def why_not_on_nvme() -> str:
    """Empty if DeepSpeed's async_io is there. It is compiled at the first use, which takes minutes."""
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    return f"DeepSpeed's async_io needs libaio and its headers (libaio-dev): {done.stderr.strip().splitlines()[-1]}"


@contextmanager
def small_swaps() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Entries of "offload_optimizer", with a folder for this rank's files, and of the configuration.

    DeepSpeed leaves on the CPU what is below 1 KiB; without this, what is below 1 MiB.
    """
    from deepspeed.runtime.swap_tensor import optimizer_utils

    with TemporaryDirectory() as folder, patch.object(optimizer_utils, "MIN_AIO_BYTES", LEAST):
        yield {"device": "nvme", "nvme_path": folder}, {"aio": {"block_size": LEAST}}


@contextmanager
def placed(case: Case) -> Iterator[Case]:
    """The case with these entries."""
    with small_swaps() as (offload, config):
        zero = {**case.zero, "offload_optimizer": {**case.zero["offload_optimizer"], **offload}}
        yield replace(case, zero=zero, config={**case.config, **config})
