"""Layouts in which LENA would not be exact are refused by name, on every rank, with what to use instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ds_lena
from ds_lena.integrations.deepspeed import bind
from ds_lena.integrations.deepspeed._internals.facts import read_facts
from ds_lena.integrations.deepspeed._internals.select import layout_of
from ds_lena.integrations.deepspeed.support import FEATURES
from tests.helpers.grids import one_grid
from tests.integrations._engines import LENA, Net, config, engine, refusal, train, without_optimizer
from tests.integrations._ranks import WORLD, Ranks


def _offload(device: str = "cpu", **entries: Any) -> dict[str, Any]:
    return {"offload_optimizer": {"device": device, **entries}}


NVME = _offload("nvme", nvme_path="/nonexistent")
MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": Net,
    "in DDP": lambda: nn.parallel.DistributedDataParallel(Net()),
}
PREDIVIDED = {"prescale_gradients": False, "gradient_predivide_factor": float(WORLD)}
WRONGLY_SCALED = (
    '"gradient_predivide_factor": 2.0, the number of ranks, at ZeRO-3 or with sequence parallelism '
    "(DeepSpeed scales wrongly there)"
)
DEEPCOMPILE = '"deepcompile" (it reduces the gradients inside of the compiled backward pass, where no hook sees them)'
DYNAMIC_BATCHING = {"data_efficiency": {"data_sampling": {"dynamic_batching": {"enabled": True, "max_tokens": 8}}}}
UNSUPPORTED: list[tuple[str, int, dict[str, Any], dict[str, str]]] = [
    # what the error calls it, stage, DeepSpeed's entries, what else is given
    ("ZeRO 0, fp16", 0, {"fp16": {"enabled": True}}, {}),
    ('"torch_autocast" with fp16', 2, {"torch_autocast": {"enabled": True, "dtype": "fp16"}}, {}),
    ('"fp16_master_weights_and_grads"', 2, {"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}}, {}),
    (
        '"bf16_master_weights_and_grads" with "offload_optimizer"',
        2,
        {"zero": _offload(), "bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
        {},
    ),
    ('"offload_optimizer" to NVMe below ZeRO 3', 2, {"zero": NVME}, {}),
    ('"offload_param" to NVMe', 3, {"zero": {"offload_param": {"device": "nvme", "nvme_path": "/nonexistent"}}}, {}),
    ('"offload_optimizer" with a "ratio" below 1', 3, {"zero": _offload(ratio=0.5)}, {}),
    ('"super_offload"', 3, {"zero": _offload(super_offload=True)}, {}),
    ('"zero_quantized_gradients"', 3, {"zero": {"zero_quantized_gradients": True}}, {}),
    ('"zero_quantized_weights"', 3, {"zero": {"zero_quantized_weights": True}}, {}),
    ('"zero_quantized_nontrainable_weights"', 3, {"zero": {"zero_quantized_nontrainable_weights": True}}, {}),
    ('"weight_quantization"', 1, {"weight_quantization": {"enabled": True}}, {}),
    ('"dynamic_batching", which makes micro-batches of several sizes', 1, DYNAMIC_BATCHING, {}),
    ('"elastic_checkpoint"', 2, {"zero": {"elastic_checkpoint": True}}, {}),
    ('"load_universal"', 2, {"checkpoint": {"load_universal": True}}, {}),
    (DEEPCOMPILE, 2, {"compile": {"deepcompile": True}}, {}),
    ('"gradient_allreduce_op": "sum"', 2, {"gradient_allreduce_op": "sum"}, {}),
    (WRONGLY_SCALED, 3, PREDIVIDED, {}),
    ("a model wrapped by DistributedDataParallel", 1, {}, {"model": "in DDP"}),
]


def refusal_of_layout(stage: int, entries: dict[str, Any], model: str = "plain") -> str:
    with one_grid():
        return refusal(config(stage, **entries), MODELS[model]())


@pytest.mark.parametrize(("what", "stage", "entries", "given"), UNSUPPORTED, ids=[case[0] for case in UNSUPPORTED])
def test_it_is_refused_by_name_on_every_rank(
    ranks: Ranks, what: str, stage: int, entries: dict[str, Any], given: dict[str, str]
) -> None:
    for message in ranks.run(refusal_of_layout, stage, entries, **given):
        assert message.startswith(f"UnsupportedError: LENA does not support {what}. Nearest supported choice: ")


@pytest.mark.parametrize("base", ["lamb", "lars"])
def test_trust_ratios_are_refused_on_nvme(ranks: Ranks, base: str) -> None:
    for message in ranks.run(refusal_of_layout, 3, {"zero": NVME, "lena": {"base": base}}):
        assert message.startswith(f'UnsupportedError: LENA does not support "base": "{base}" with "offload_optimizer"')
        assert '"device": "cpu"' in message


def test_what_is_refused_is_welcome_when_it_is_off(ranks: Ranks) -> None:
    off = {
        "zero": {
            "offload_optimizer": {"device": "none"},
            "offload_param": {"device": "none"},
            "zero_hpz_partition_size": 1,
            "elastic_checkpoint": False,
        },
        "fp16": {"enabled": False},
        "tensor_parallel": {"autotp_size": 1},
        "gradient_allreduce_op": "mean",
    }
    assert ranks.run(refusal_of_layout, 3, off) == ["", ""]


def refusals_of_zenflow() -> list[str]:
    with engine(config(2)) as made:
        made.zenflow = True
        facts = read_facts(made)
        return [feature.what for feature in FEATURES if not feature.by and feature.is_on(facts)]


def test_zenflow_is_refused_too_though_it_cannot_start_here(ranks: Ranks) -> None:
    assert ranks.run(refusals_of_zenflow) == [['"zenflow"']] * 2


def refusal_of_misread_weights(stage: int) -> str:
    """By a version of ds_lena that takes the parameters for each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bind, "layout_of", lambda view, index, _: layout_of(view, {i: 1 - index[i] for i in index}))
        return refusal(config(stage), nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)]))


@pytest.mark.parametrize("stage", range(4))
def test_weights_that_are_not_where_they_are_expected_are_refused(ranks: Ranks, stage: int) -> None:
    for message in ranks.run(refusal_of_misread_weights, stage):
        assert message.startswith('StateError: LENA: the weights of "') and "do not lie where" in message


def refusal_of_callable() -> str:
    entries = without_optimizer(config(2, zero={"elastic_checkpoint": True}))
    return refusal(entries, optimizer=lambda parameters: ds_lena.LENA(parameters, **LENA))


def test_a_callable_that_makes_it_is_refused_too(ranks: Ranks) -> None:
    for message in ranks.run(refusal_of_callable):
        assert 'LENA does not support "elastic_checkpoint"' in message


def refusal_of_client(forced: bool) -> str:
    model = Net()
    entries = without_optimizer(config(2, "fp32 + offload"), zero_force_ds_cpu_optimizer=forced)
    return refusal(entries, model, optimizer=ds_lena.LENA(model.parameters(), **LENA))


def test_a_client_with_offload_is_told_of_the_key_that_deepspeed_wants(ranks: Ranks) -> None:
    for message in ranks.run(refusal_of_client, True):
        assert message.startswith("ConfigError") and '"zero_force_ds_cpu_optimizer": false' in message
    assert ranks.run(refusal_of_client, False) == ["", ""]


def refusal_of_a_part(stage: int, base: str, clipping: float, freeze: bool = False, precision: str = "fp32") -> str:
    """Only one of the two towers is given to the optimizer."""
    model = Net()
    model.right.requires_grad_(not freeze)
    entries = config(stage, precision, lena={"base": base}, gradient_clipping=clipping)
    return refusal(entries, model, model_parameters=list(model.left.parameters()))


def test_a_clipping_norm_that_trust_ratios_cannot_know_is_refused(ranks: Ranks) -> None:
    for message in ranks.run(refusal_of_a_part, 0, "lamb", 1.0):
        assert message.startswith("UnsupportedError: ") and '"right.0.weight"' in message


@pytest.mark.parametrize(
    ("stage", "base", "clipping", "freeze", "precision"),
    [
        (0, "lamb", 0.0, False, "fp32"),
        (0, "adamw", 1.0, False, "fp32"),
        (0, "lars", 1.0, True, "fp32"),
        (0, "lars", 1.0, False, "bf16"),
        (1, "lars", 1.0, False, "fp32"),
    ],
)
def test_where_the_norm_is_known_a_part_of_the_model_is_welcome(
    ranks: Ranks, stage: int, base: str, clipping: float, freeze: bool, precision: str
) -> None:
    assert ranks.run(refusal_of_a_part, stage, base, clipping, freeze, precision) == ["", ""]


def refusal_of_compiled_autograd(stage: int) -> str:
    from deepspeed.accelerator import get_accelerator

    with pytest.MonkeyPatch.context() as patch, engine(config(stage)) as made:
        patch.setattr(get_accelerator(), "get_compile_backend", lambda: "aot_eager")
        made.compile(backend="aot_eager", compiled_autograd_enabled=True)
        try:
            train(made, range(1))
        except ds_lena.UnsupportedError as error:
            return str(error)
        finally:
            torch._dynamo.reset()
    return ""


@pytest.mark.parametrize("stage", [0, 2])
def test_compiled_autograd_is_refused_in_the_first_backward(ranks: Ranks, stage: int) -> None:
    for message in ranks.run(refusal_of_compiled_autograd, stage):
        assert "LENA does not support compiled autograd" in message


def another_optimizer_in(entries: dict[str, Any]) -> str:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    return refusal(without_optimizer(config(2, **entries)), model, optimizer=optimizer)


def test_other_optimizers_are_left_alone(ranks: Ranks) -> None:
    assert ranks.run(another_optimizer_in, {"gradient_allreduce_op": "sum"}) == ["", ""]
