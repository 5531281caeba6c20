"""Where and with what a measurement was made."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "deepspeed", "transformers", "timm")


def describe() -> dict[str, Any]:
    """Hardware, its load at present, versions, and the commit of ds_lena."""
    import ds_lena

    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "accelerators": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "versions": {"python": platform.python_version(), **_installed(), "ds_lena": ds_lena.__version__},
        "commit": _commit(Path(ds_lena.__file__).parent),
    }


def _installed() -> dict[str, str]:
    distributions = {name: next(iter(importlib.metadata.distributions(name=name)), None) for name in PACKAGES}
    return {name: found.version for name, found in distributions.items() if found}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit(folder: Path) -> str | None:
    """The short hash, "+changes" behind it where the package differs from it; None outside of a git checkout."""
    commit = _git(folder, "rev-parse", "--short", "HEAD")
    if not commit:
        return None
    return commit + ("+changes" if _git(folder, "status", "--porcelain", "--", ".") else "")


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
