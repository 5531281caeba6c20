"""DeepSpeed's AdamW for the CPU moves pieces as torch's AdamW does, also where its own bias correction is off."""

from __future__ import annotations

import logging

import pytest
import torch

from ds_lena.integrations.deepspeed._internals import cpu_adam
from ds_lena.update.rules import adamw
from tests.integrations._engines import config, engine, moved, train
from tests.integrations._ranks import Ranks

SIZES = (1, 7, 1000, 70_001)
NEAR_ONE = (0.9, 0.99999)


def tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for size in SIZES]


def moved_by(move, betas: tuple[float, float], weight_decay: float, dtype: torch.dtype) -> list[torch.Tensor]:
    """Weights and moments after some updates, one after the other."""
    weights = [weight.to(dtype) for weight in tensors(0)]
    buffers = [[torch.zeros_like(weight) for weight in weights] for _ in range(2)]
    for update in range(1, 6):
        gradients = [gradient.to(dtype) for gradient in tensors(update)]
        step = torch.tensor(float(update))
        move(weights, gradients, buffers, step, 0.1 / update, weight_decay, {"betas": betas, "eps": 1e-8})
    return [*weights, *buffers[0], *buffers[1]]


@pytest.fixture(scope="module")
def kernel():
    """Compiled at the first use: minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DS_BUILD_CPU_ADAM", raising=False)
        patch.setenv("DS_ACCELERATOR", "cpu")
        move = cpu_adam.adamw_on_cpu()
    assert move is not adamw.move, "it cannot be compiled here"
    return move


@pytest.mark.full
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), NEAR_ONE], ids=str)
def test_it_moves_as_torch_does(kernel, betas, weight_decay):
    mine = [tensor.double() for tensor in moved_by(kernel, betas, weight_decay, torch.float32)]
    exact = moved_by(adamw.move, betas, weight_decay, torch.float64)
    count = len(SIZES)
    torch.testing.assert_close(mine[:count], exact[:count], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(mine[count:], exact[count:], rtol=2e-3, atol=1e-7)  # the betas are rounded to float32


@pytest.mark.full
def test_pieces_of_another_type_move_by_torch_s_kernel(kernel):
    mine, theirs = (moved_by(move, (0.9, 0.999), 0.1, torch.bfloat16) for move in (kernel, adamw.move))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def trained(stage: int, is_compiled: str) -> tuple[bool, list[torch.Tensor]]:
    """Whether the kernel is in use, and all that an engine has moved."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_BUILD_CPU_ADAM", is_compiled)
        with engine(config(stage, "fp32 + offload", {"weight_decay": 0.1})) as made:
            train(made, range(4))
            in_use = made.basic_optimizer._controller.binding.moves["adamw"] is not adamw.move
            return in_use, moved(made)


@pytest.mark.full
@pytest.mark.parametrize("stage", [2, 3])
def test_an_engine_uses_it(kernel, ranks: Ranks, stage: int) -> None:
    own, torchs = ranks.run(trained, stage, "1"), ranks.run(trained, stage, "0")
    for (with_kernel, mine), (without, theirs) in zip(own, torchs, strict=True):
        assert (with_kernel, without) == (True, False)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        assert not all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_deepspeed_s_own_switch_keeps_torch_s(monkeypatch):
    monkeypatch.setenv("DS_BUILD_CPU_ADAM", "0")
    assert cpu_adam.adamw_on_cpu() is adamw.move


def test_where_it_cannot_be_compiled_torch_s_is_used_and_it_is_said(monkeypatch, caplog):
    from deepspeed.ops.op_builder.builder import OpBuilder

    def fail(*_):
        raise RuntimeError("no ninja")

    monkeypatch.delenv("DS_BUILD_CPU_ADAM", raising=False)
    monkeypatch.setattr(OpBuilder, "load", fail)
    with caplog.at_level(logging.WARNING, "ds_lena"):
        assert cpu_adam.adamw_on_cpu() is adamw.move
    assert "no ninja" in caplog.text and "ds_report" in caplog.text
