"""Faults of DeepSpeed, with stock optimizers, that LENA works around, refuses or tells of: are they still there?

A test that fails here is good news: this DeepSpeed has mended the fault. Then what it names can go.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.helpers.case import Case
from tests.integrations._engines import Net, batch, config, engine, stock_engine, train, without_optimizer
from tests.integrations._ranks import WORLD, Ranks
from tests.integrations._split import TwoParts
from tests.integrations._truth import numbers

PREDIVIDED = {"prescale_gradients": False, "gradient_predivide_factor": float(WORLD)}
BOUND = 1e-3  # of the clipped norm


def still(is_so: bool, about_it: str) -> None:
    """`about_it`: what there is in ds_lena because of this fault."""
    assert is_so, f"This DeepSpeed has mended the fault. What can go: {about_it}."


# -- how far SGD goes -------------------------------------------------------------------------------------------------


@contextmanager
def sgd(entries: dict[str, Any], model: nn.Module | None = None, lr: float = 0.1, mpu: Any = None) -> Iterator[Any]:
    """An engine with stock SGD, which hides no factor."""
    model = Net() if model is None else model
    any_optimizer = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    given = {} if mpu is None else {"mpu": mpu}
    with engine(without_optimizer(entries, **any_optimizer), model, optimizer=optimizer, **given) as made:
        yield made


def right_tower(made: Any) -> torch.Tensor:
    import deepspeed

    weight = made.module.right[0].weight
    with deepspeed.zero.GatheredParameters(weight):
        return weight.detach().clone()


def way(made: Any, update: int, used_in: tuple[int, ...] = (0, 1)) -> float:
    """How far an update moves the right tower, whose micro-batches `used_in` use it."""
    before = right_tower(made)
    for micro in range(2):
        x, y = batch(update, micro)
        made.set_gradient_accumulation_boundary(micro == 1)
        made.backward(made(x, y) if micro in used_in else made(x))
        made.step()
    return float((right_tower(made) - before).norm())


def ways(stage: int, precision: str, *used_in: tuple[int, ...], **entries: Any) -> list[float]:
    """Of one update after the other, each of which uses the right tower in other micro-batches."""
    with sgd(config(stage, precision, **entries)) as made:
        return [way(made, update, used) for update, used in enumerate(used_in)]


ALWAYS, NEVER, FIRST = (0, 1), (), (0,)


def test_zero_3_keeps_the_gradient_of_the_window_before(ranks: Ranks) -> None:
    assert [of_rank[1] for of_rank in ranks.run(ways, 2, "fp32", ALWAYS, NEVER)] == [0.0, 0.0]
    _, unused = ranks.run(ways, 3, "fp32", ALWAYS, NEVER)[0]
    still(unused > 1e-4, "Zero3Layout.clear_gradients")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_keeps_the_gradient_of_the_window_before(ranks: Ranks, stage: int) -> None:
    _, unused = ranks.run(ways, stage, "fp32 + offload", ALWAYS, NEVER)[0]
    still(unused > 1e-4, "KeptGradients, clear_gradients of the layouts with offload")


@pytest.mark.parametrize("stage", [2, 3])
def test_offload_loses_a_gradient_that_the_last_micro_batch_does_not_have(ranks: Ranks, stage: int) -> None:
    assert ranks.run(ways, stage, "fp32", FIRST)[0][0] > 1e-4
    still(ranks.run(ways, stage, "fp32 + offload", FIRST)[0] == [0.0], "_write_missed of the layouts with offload")


def test_fp16_at_zero_0_divides_by_a_loss_scale_that_is_not_in_the_gradients(ranks: Ranks) -> None:
    (wanted,) = ranks.run(ways, 1, "fp32", ALWAYS)[0]
    (found,) = ranks.run(ways, 0, "fp32", ALWAYS, fp16={"enabled": True, "loss_scale": 128})[0]
    still(found == pytest.approx(wanted / 128, rel=0.2), '"ZeRO 0, fp16" in support/refused.py')


@pytest.mark.parametrize("stage", [1, 3])
def test_a_dynamic_loss_scale_is_raised_before_the_gradients_are_divided_by_it(ranks: Ranks, stage: int) -> None:
    growing = {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 2}
    wanted = ranks.run(ways, stage, "fp32", *[ALWAYS] * 3, fp16={"enabled": True, "loss_scale": 16})[0]
    found = ranks.run(ways, stage, "fp32", *[ALWAYS] * 3, fp16=growing)[0]
    halved = [mine / theirs for mine, theirs in zip(found, wanted, strict=True)]
    still(halved == pytest.approx([1.0, 1.0, 0.5], rel=0.02), "_internals/loss_scale.py")


def test_a_predivide_factor_that_is_the_number_of_ranks_stays_in_the_gradient_at_zero_3(ranks: Ranks) -> None:
    wanted = ranks.run(ways, 3, "fp32", ALWAYS)[0][0]
    found = ranks.run(ways, 3, "fp32", ALWAYS, zero={"reduce_scatter": False}, **PREDIVIDED)[0][0]
    still(found == pytest.approx(wanted / WORLD, rel=1e-3), '"gradient_predivide_factor" in support/refused.py')


# -- the norm by which it clips ---------------------------------------------------------------------------------------


def parts() -> nn.Module:
    """A model of which this rank has a part of each tensor."""
    model = Net(seed=dist.get_rank())
    for parameter in model.parameters():
        parameter.tensor_model_parallel = True
    return model


def two_stages() -> nn.Module:
    from deepspeed.pipe import PipelineModule

    return PipelineModule(layers=[nn.Linear(4, 4), nn.Linear(4, 4)], num_stages=WORLD, loss_fn=nn.MSELoss())


def clipped_way(stage: int, precision: str, is_pipeline: bool) -> float:
    """How far all ranks together go by SGD with clipping, as a multiple of what they should."""
    model = two_stages() if is_pipeline else parts()
    mpu = None if is_pipeline else TwoParts()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with sgd(config(stage, precision, gradient_clipping=BOUND), model, lr=1 / BOUND, mpu=mpu) as made:
        pairs = [(numbers(0, micro, shape=(2, 4)), numbers(0, micro, 7, shape=(2, 4))) for micro in range(2)]
        if is_pipeline:
            made.train_batch(iter(pairs))
        else:
            for pair in pairs:
                made.backward(made(*pair))
                made.step()
        after = list(made.module.parameters())
        square = sum((new.detach().float() - old).square().sum() for new, old in zip(after, before, strict=True))
    dist.all_reduce(square)
    return math.sqrt(square)


@pytest.mark.parametrize(("precision", "is_pipeline"), [("fp32", True), ("bf16", False)])
def test_zero_0_clips_a_model_that_is_split_over_ranks_by_the_norm_of_one_part(
    ranks: Ranks, precision: str, is_pipeline: bool
) -> None:
    assert ranks.run(clipped_way, 1, precision, is_pipeline) == pytest.approx([1.0, 1.0], rel=0.05)
    found = ranks.run(clipped_way, 0, precision, is_pipeline)[0]
    still(found > 1.1, "the refusal at ZeRO 0 in _require_known_norm of attach.py, and notes in docs/layouts.md")


# -- copies and names -------------------------------------------------------------------------------------------------


def drifted(split: str) -> list[str]:
    """The tensors of Megatron-core's GPT whose copies differ after an update by stock AdamW."""
    from tests.helpers import deepspeed_run
    from tests.helpers.make import windows

    case = Case(split, stage=1, split=split, groups="flat", tensor=WORLD, optimizer="stock", windows=windows(1))
    return [name for name, weight in deepspeed_run.run(case)["params"].items() if weight.isnan().any()]


def test_layer_norms_under_sequence_parallel_drift_apart(ranks: Ranks) -> None:
    assert ranks.run(drifted, "megatron-sequence") == [[], []]
    found = ranks.run(drifted, "megatron-sequence-unsummed")[0]
    still(any("layernorm" in name for name in found), "sum_partial_gradients in integrations/megatron.py")


def test_megatron_core_lacks_names_that_deepspeed_calls_of_an_mpu() -> None:
    from megatron.core import parallel_state

    source = inspect.getsource(parallel_state)
    still("def get_model_parallel_rank" not in source, "name_mpu_calls in integrations/megatron.py")


# -- where values lie -------------------------------------------------------------------------------------------------


def wrong_fragments(round_robin: bool) -> int:
    """For how many parameters DeepSpeed's own fragment map shows another tensor's fp32 values after two updates."""
    from deepspeed.utils import safe_get_full_fp32_param

    with stock_engine(config(2, zero={"round_robin_gradients": round_robin}), Net(depth=3)) as made:
        train(made, range(2))
        return sum(not torch.equal(safe_get_full_fp32_param(p), p.detach()) for p in made.module.parameters())


def test_the_fragment_map_is_wrong_under_round_robin(ranks: Ranks) -> None:
    assert ranks.run(wrong_fragments, False) == [0, 0]
    still(all(wrong > 0 for wrong in ranks.run(wrong_fragments, True)), "what Zero12Layout does in its place")


def test_no_optimizer_state_is_loaded_from_a_checkpoint_with_the_optimizer_on_nvme() -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    skips = "if load_zero_checkpoint and not self.zero_nvme_offload_optimizer():"
    still(skips in inspect.getsource(DeepSpeedEngine.load_checkpoint), "attach.py: _refuse_load")
