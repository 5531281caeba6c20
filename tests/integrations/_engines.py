"""A small model, DeepSpeed engines around it, and training loops. All of it runs on the ranks; nothing here asserts."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import ds_lena
from tests.helpers.grids import one_grid

LENA = {"lr": 1e-2, "total_steps": 20, "smoothing": 0.5, "warmup_fraction": 0.1}
"""Keys of the optimizer entry unless a test says otherwise; quick averages, so that gains move at once."""

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
"""An entry of "zero_optimization"."""

MICRO_BATCH = 2
ACCUMULATION = 2


class Net(nn.Module):
    """`net(x, y)` is the loss of two towers that share nothing: one can be given a bad input, the right one none."""

    def __init__(self, seed: int = 0, width: int = 8, depth: int = 1) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.left, self.right = _tower(width, depth), _tower(width, depth)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        dtype = self.left[0].weight.dtype
        loss = self.left(x.to(dtype)).square().mean()
        return loss if y is None else loss + (self.right(y.to(dtype)) - 1).square().mean()


def _tower(width: int, depth: int) -> nn.Sequential:
    inner = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), *inner, nn.Linear(width, 3))


def batch(update: int, micro: int) -> tuple[Tensor, Tensor]:
    """Decided by its place in the run and by the rank alone."""
    generator = torch.Generator().manual_seed(1 + 1000 * update + 10 * micro + torch.distributed.get_rank())
    return torch.randn(MICRO_BATCH, 4, generator=generator), torch.randn(MICRO_BATCH, 4, generator=generator)


def config(stage: int, precision: str = "fp32", lena: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A DeepSpeed configuration with LENA.

    `precision` is fp32, bf16, bf16-fp32 (fp32 accumulation) or fp16, with " + offload" for the optimizer on the CPU.
    """
    precision, _, offload = precision.partition(" + ")
    zero = OFFLOAD if offload else {}
    entries: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 0.0,
        "steps_per_print": 1_000_000,
        "zero_optimization": {"stage": stage} | zero | more.pop("zero", {}),
        "optimizer": {"type": "LENA", "params": LENA | (lena or {})},
    }
    if precision == "fp16":
        entries["fp16"] = {"enabled": True, "initial_scale_power": 10}
    if precision.startswith("bf16"):
        entries["bf16"] = {"enabled": True}
        entries["data_types"] = {"grad_accum_dtype": "bf16" if precision == "bf16" else "fp32"}
    return entries | more


def without_optimizer(entries: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The same configuration for a client optimizer."""
    return {key: value for key, value in entries.items() if key != "optimizer"} | more


def muon_in_eager(entries: dict[str, Any]) -> AbstractContextManager[Any]:
    """DeepSpeed's Muon is compiled at its first step, which can take longer than a rank waits. Not within this."""
    has_muon = entries.get("optimizer", {}).get("type") == "Muon"
    return torch.compiler.set_stance("force_eager") if has_muon else nullcontext()


@contextmanager
def engine(entries: dict[str, Any], model: nn.Module | None = None, **initialize: Any) -> Iterator[Any]:
    """An engine that is destroyed at the end."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True  # a CPU's says no, and computes in fp16 all the same
    is_split = "mpu" in initialize or isinstance(model, deepspeed.PipelineModule)
    with muon_in_eager(entries), one_grid() if is_split else nullcontext():
        made, *_ = deepspeed.initialize(model=Net() if model is None else model, config=entries, **initialize)
        try:
            yield made
        finally:
            made.destroy()


@contextmanager
def stock_engine(entries: dict[str, Any], model: nn.Module | None = None, **keys: Any) -> Iterator[Any]:
    """The same engine with torch's fused AdamW."""
    model = Net() if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=LENA["lr"], fused=True, **keys)
    with engine(without_optimizer(entries), model, optimizer=optimizer) as made:
        yield made


def refusal(entries: dict[str, Any], model: nn.Module | None = None, **initialize: Any) -> str:
    """The error that making an engine ended with, "" for none. The ranks meet afterwards: none may be left behind."""
    try:
        with engine(entries, model, **initialize):
            message = ""
    except ds_lena.LenaError as error:
        message = f"{type(error).__name__}: {error}"
    torch.distributed.barrier()
    return message


def train(
    engine: Any, updates: Sequence[int], micros: Sequence[int] = (ACCUMULATION,), poisoned: Sequence[int] = ()
) -> None:
    """Run the updates with these numbers; update i has `micros[i % len(micros)]` micro-batches.

    `poisoned`: updates in which rank 1 gives the right tower an infinite input.
    """
    for update in updates:
        last = micros[update % len(micros)] - 1
        for micro in range(last + 1):
            x, y = batch(update, micro)
            if update in poisoned and torch.distributed.get_rank() == 1:
                y = y + float("inf")
            engine.set_gradient_accumulation_boundary(micro == last)
            engine.backward(engine(x, y))
            engine.step()


def moved(engine: Any) -> list[Tensor]:
    """All that an update changes: the weights, the fp32 weights, and the base rule's state. Every rank calls it."""
    state = engine.basic_optimizer.state
    if engine.zero_optimization_stage() == 3:
        return _moved_at_stage_3(engine, [key for key, value in next(iter(state.values())).items() if value.dim()])
    tensors = list(engine.module.parameters())
    for master in (p for group in engine.basic_optimizer.param_groups for p in group["params"] if p in state):
        tensors += [master, *(value for _, value in sorted(state[master].items()))]
    return [tensor.detach().clone() for tensor in tensors]


def _moved_at_stage_3(engine: Any, keys: list[str]) -> list[Tensor]:
    """Whole parameters, put together from all ranks: DeepSpeed's parts end in padding that it leaves uninitialised."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    tensors = []
    for parameter in engine.module.parameters():
        with deepspeed.zero.GatheredParameters(parameter):
            tensors.append(parameter.detach().clone())
        tensors.append(safe_get_full_fp32_param(parameter))
        tensors += [safe_get_full_optimizer_state(parameter, key) for key in keys]
    return tensors


@contextmanager
def said(logger: str = "ds_lena", level: int = logging.WARNING) -> Iterator[list[str]]:
    """The messages that were logged meanwhile."""
    messages: list[str] = []
    handler = logging.Handler(level)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    source = logging.getLogger(logger)
    source.addHandler(handler)
    try:
        yield messages
    finally:
        source.removeHandler(handler)
