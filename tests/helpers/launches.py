"""What an update launches on a GPU, counted on the CPU: LENA takes the GPU's paths, and a recording counts as one."""

from __future__ import annotations

import contextlib
import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

NO_LAUNCHES = {"detach", "slice", "select", "unbind", "view", "t", "expand", "split_with_sizes", "alias",
               "_unsafe_view", "unsqueeze", "transpose", "as_strided", "empty", "empty_like"}  # fmt: skip

KERNELS = ("adamw", "sgd", "lars", "lamb_norms", "lars_norms")


class Chain(nn.Module):
    """Small layers, each with one tensor."""

    def __init__(self, tensors: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(torch.randn(3, 3, generator=generator) / 2 for _ in range(tensors))

    def forward(self, inputs: Tensor) -> Tensor:
        for weight in self.weights:
            inputs = torch.tanh(inputs @ weight)
        return inputs


class Launches(TorchDispatchMode):
    """Counts calls of ATen that launch something, replays of recordings, and Triton kernels, by name."""

    current: Launches | None = None

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __enter__(self) -> Launches:
        Launches.current = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Launches.current = None
        super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).split(".")[1]
        if name not in NO_LAUNCHES:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return self.counts.total()


def count(name: str) -> None:
    if Launches.current is not None:
        Launches.current.counts[name] += 1


class Replay:
    """In place of a CUDA graph: what was recorded runs again, and counts as one launch."""

    def __init__(self, run: Callable[[], Any]) -> None:
        from ds_lena.recorded import tensors_in

        self._run, self._tensors_in, self._is_fresh = run, tensors_in, True
        with _disable_current_modes():
            self.result = run()

    def replay(self) -> None:
        count("recording")
        if self._is_fresh:
            self._is_fresh = False
            return
        with _disable_current_modes():
            for old, new in zip(self._tensors_in(self.result), self._tensors_in(self._run()), strict=True):
                old.copy_(new)


def capture(run: Callable[[], Any], device: torch.device) -> tuple[Replay, Any]:
    replay = Replay(run)
    return replay, replay.result


class _Kernel:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *_, **__: count(self._name)


@contextlib.contextmanager
def paths_of_a_gpu(with_kernels: bool = False) -> Iterator[None]:
    """As `as_on_a_gpu`, within it."""
    with pytest.MonkeyPatch.context() as patch:
        as_on_a_gpu(patch, with_kernels)
        yield


def as_on_a_gpu(monkeypatch: Any, with_kernels: bool = False) -> None:
    """Take the paths of a GPU with tensors on the CPU. `with_kernels`: Triton's, which are counted and do nothing."""
    recorded = importlib.import_module("ds_lena.recorded")
    monkeypatch.setattr(recorded, "can_record", lambda tensors: True)
    monkeypatch.setattr(recorded, "capture", capture)
    monkeypatch.setattr(importlib.import_module("ds_lena.grad_stats.norms"), "is_batched", lambda tensor: True)
    if with_kernels:
        types = {torch.float32: None, torch.bfloat16: None}
        module = SimpleNamespace(TYPES=types, **{name: _Kernel(name) for name in KERNELS})
        launch = importlib.import_module("ds_lena.update.kernels.launch")
        monkeypatch.setattr(launch, "programs", lambda: module)
        for name in ("apply", "trust_ratio"):
            module_there = importlib.import_module(f"ds_lena.update.{name}")
            monkeypatch.setattr(module_there, "runs_on", lambda device: True)
