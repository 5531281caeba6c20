"""What tensor parallelism needs is there, or refused, with one message on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ds_lena
from tests.helpers.megatron_gpt import megatrons_groups
from tests.integrations._engines import Net, config, engine, moved, refusal, train
from tests.integrations._ranks import WORLD, Ranks
from tests.integrations._split import TwoParts
from tests.integrations._truth import numbers


class TwoStages(TwoParts):
    """As Megatron-core's parallel_state with pipeline_model_parallel_size 2."""

    def get_tensor_model_parallel_world_size(self) -> int:
        return 1

    def get_pipeline_model_parallel_world_size(self) -> int:
        return WORLD


def marked(model: nn.Module, **marks: Any) -> nn.Module:
    """Set the marks on one bias, on rank 1 only: the other rank has to refuse too."""
    if dist.get_rank() == 1:
        for name, value in marks.items():
            setattr(model.left[0].bias, name, value)
    return model


def refused(stage: int, mpu: type[TwoParts], marks: dict[str, Any], **given: Any) -> str:
    return refusal(config(stage), marked(Net(), **marks), mpu=mpu(**given))


def refused_in_context() -> str:
    with megatrons_groups(context_parallel_size=WORLD) as parallel_state:
        return refusal(config(1), Net(), mpu=parallel_state)


def test_context_parallelism_is_refused(ranks: Ranks) -> None:
    for message in ranks.run(refused_in_context):
        assert "LENA does not support context parallelism" in message and "context_parallel_size" in message


def refused_beside_groups(**sizes: int) -> str:
    with megatrons_groups(**sizes):
        return refusal(config(1), Net())


@pytest.mark.parametrize("size", ["tensor_model_parallel_size", "pipeline_model_parallel_size"])
def test_groups_of_megatron_that_the_engine_does_not_know_are_refused(ranks: Ranks, size: str) -> None:
    for message in ranks.run(refused_beside_groups, **{size: WORLD}):
        assert "LENA does not support parallel groups of Megatron-core of which the engine does not know" in message
        assert "mpu=parallel_state" in message


def test_stages_without_a_pipeline_module_are_refused(ranks: Ranks) -> None:
    for message in ranks.run(refused, 1, TwoStages, {}):
        assert "LENA does not support an mpu with several pipeline stages and a model that is no Pipeline" in message


def test_a_model_on_some_ranks_only_is_refused(ranks: Ranks) -> None:
    for message in ranks.run(refused, 1, TwoParts, {}, averages=True):
        assert "LENA does not support a model on some of the ranks only" in message


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_partial_gradients_that_nobody_adds_up_are_refused_on_every_rank(ranks: Ranks, stage: int) -> None:
    first, second = ranks.run(refused, stage, TwoParts, {"sequence_parallel": True})
    assert first == second
    assert '"left.0.bias"' in first and "sum_partial_gradients(model) before deepspeed.initialize" in first


def trained_apart(stage: int) -> str:
    """Both ranks say they hold copies of one model, and each trains it on data of its own."""
    with engine(config(stage), Net(), mpu=TwoParts()) as made:
        try:
            train(made, range(1))
        except ds_lena.StateError as error:
            return str(error)
        finally:
            dist.barrier()
    return ""


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_copies_with_different_gradients_are_refused_at_the_first_update(ranks: Ranks, stage: int) -> None:
    first, second = ranks.run(trained_apart, stage)
    assert first == second
    assert "is not the same on all tensor-parallel ranks" in first and "tensor_model_parallel = True" in first


def train_alike(made: Any, updates: range) -> None:
    """Both ranks see the same data, as the ranks do that hold parts of one model."""
    for update in updates:
        for micro in range(2):
            made.backward(made(numbers(update, micro, shape=(2, 4)), numbers(update, micro, 7, shape=(2, 4))))
            made.step()


def resumed(folder: str, stage: int) -> tuple[bool, bool]:
    """Whether a run that goes on from its checkpoint ends with the same report, and the same weights."""
    with engine(config(stage), Net(), mpu=TwoParts()) as made:
        train_alike(made, range(2))
        made.save_checkpoint(folder)
        train_alike(made, range(2, 4))
        report, weights = ds_lena.report(made), moved(made)
    with engine(config(stage), Net(seed=1), mpu=TwoParts()) as made:
        made.load_checkpoint(folder)
        train_alike(made, range(2, 4))
        same = all(torch.equal(a, b) for a, b in zip(weights, moved(made), strict=True))
        return ds_lena.report(made) == report, same


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_resumed_run_is_the_unbroken_run(ranks: Ranks, tmp_path: Path, stage: int) -> None:
    assert ranks.run(resumed, str(tmp_path), stage) == [(True, True)] * 2


def refused_lamb(stage: int, precision: str) -> str:
    return refusal(config(stage, precision, lena={"base": "lamb"}, gradient_clipping=1.0), Net(), mpu=TwoParts())


def test_trust_ratios_with_clipping_in_bf16_at_zero_0_are_refused(ranks: Ranks) -> None:
    first, second = ranks.run(refused_lamb, 0, "bf16")
    assert first == second and "that is split over ranks, at ZeRO 0" in first
    assert ranks.run(refused_lamb, 0, "fp32") == ranks.run(refused_lamb, 1, "bf16") == ["", ""]


def other_group_options() -> str:
    """Rank 1 leaves out what rank 0 trains with LENA."""
    model = Net()
    group = {"params": list(model.parameters()), "lena": dist.get_rank() == 0}
    return refusal(config(1), model, model_parameters=[group], mpu=TwoParts())


def test_ranks_that_disagree_on_a_layer_are_told_so(ranks: Ranks) -> None:
    first, second = ranks.run(other_group_options)
    assert first == second and "the ranks of one model disagree on" in first


def names_of_mpu() -> bool:
    from megatron.core import parallel_state

    return (
        parallel_state.get_model_parallel_world_size is parallel_state.get_tensor_model_parallel_world_size
        and parallel_state.get_model_parallel_rank is parallel_state.get_tensor_model_parallel_rank
    )


def test_megatrons_parallel_state_has_the_names_that_deepspeed_calls(ranks: Ranks) -> None:
    assert ranks.run(names_of_mpu) == [True, True]
