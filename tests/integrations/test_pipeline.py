"""Pipelines in which LENA would not be exact are refused, with one message on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_lena
from tests.integrations._engines import config, engine, refusal
from tests.integrations._ranks import WORLD, Ranks
from tests.integrations._truth import numbers


class Fork(nn.Linear):
    """Hands on two tensors."""

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y, torch.tanh(y)


class Join(nn.Linear):
    def forward(self, both: tuple[Tensor, Tensor]) -> Tensor:
        return super().forward(both[0] * both[1])


def pipeline(first: type[nn.Linear] = nn.Linear, second: type[nn.Linear] = nn.Linear, dual: bool = False) -> nn.Module:
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.dualpipev import DualPipeVModule

    if dual:
        layers = [nn.Linear(4, 4) for _ in range(2 * WORLD)]
        return DualPipeVModule(layers=layers, num_stages=WORLD, loss_fn=nn.MSELoss())
    return PipelineModule(layers=[first(4, 4), second(4, 4)], num_stages=WORLD, loss_fn=nn.MSELoss())


def refused(stage: int, lena: dict[str, Any], clipping: float, dual: bool = False) -> str:
    return refusal(config(stage, lena=lena, gradient_clipping=clipping), pipeline(dual=dual))


def test_a_dual_pipe_is_refused(ranks: Ranks) -> None:
    for message in ranks.run(refused, 1, {}, 0.0, dual=True):
        assert "LENA does not support a DualPipeVModule" in message


@pytest.mark.parametrize("base", ["lamb", "lars"])
def test_trust_ratios_with_clipping_at_zero_0_are_refused(ranks: Ranks, base: str) -> None:
    first, second = ranks.run(refused, 0, {"base": base}, 1.0)
    assert first == second and "that is split over ranks, at ZeRO 0" in first and "Use ZeRO 1" in first


def refused_autotp() -> str:
    cuts = {"use_default_specs": False, "layer_specs": [{"patterns": ["0.weight$"], "partition_type": "column"}]}
    return refusal(config(1, tensor_parallel={"autotp_size": WORLD, "partition_config": cuts}), pipeline())


def test_autotp_in_a_pipeline_is_refused(ranks: Ranks) -> None:
    for message in ranks.run(refused_autotp):
        assert "LENA does not support AutoTP with a PipelineModule" in message


@pytest.mark.parametrize(("stage", "base", "clipping"), [(0, "lamb", 0.0), (1, "lamb", 1.0), (0, "adamw", 1.0)])
def test_other_pipelines_are_welcome(ranks: Ranks, stage: int, base: str, clipping: float) -> None:
    assert ranks.run(refused, stage, {"base": base}, clipping) == ["", ""]


def trained(forks: bool) -> str:
    parts = (Fork, Join) if forks else ()
    with engine(config(1), pipeline(*parts)) as made:
        try:
            for update in range(2):
                pairs = [(numbers(update, m, shape=(2, 4)), numbers(update, m, 7, shape=(2, 4))) for m in range(2)]
                made.train_batch(iter(pairs))
        except ds_lena.UnsupportedError as error:
            return str(error)
        finally:
            dist.barrier()
    return ""


def test_a_stage_that_hands_on_two_tensors_is_refused_on_every_rank(ranks: Ranks) -> None:
    assert ranks.run(trained, False) == ["", ""]
    first, second = ranks.run(trained, True)
    assert first == second
    assert "saw 4 backward passes for 2 micro-batches" in first and "partition_method" in first
