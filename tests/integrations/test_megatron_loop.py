"""LENA around Megatron-core's own optimizers: what is refused, on every rank alike, and a run that goes on."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ds_lena
from ds_lena.integrations.megatron import sum_partial_gradients, watch, wrap
from tests.helpers.megatron_run import megatron, update_of
from tests.integrations._ranks import Ranks

SHARDED = {"use_distributed_optimizer": True}


# -- refused ----------------------------------------------------------------------------------------------------------


def model_config(chunk: Any, _: Any) -> Any:
    return chunk.config


def ddp_config(chunk: Any, _: Any) -> Any:
    return chunk.ddp_config


def optimizer_config(_: Any, optimizer: Any) -> Any:
    return optimizer.config


def bias(chunk: Any, _: Any) -> Any:
    return chunk.module.decoder.final_layernorm.bias


def layer(chunk: Any, _: Any) -> Any:
    return chunk.module.output_layer


REFUSED: dict[str, tuple[Callable[[Any, Any], Any], str, Any, str]] = {
    "fused": (model_config, "gradient_accumulation_fusion", True, "gradient_accumulation_fusion=False"),
    "fused layer": (layer, "fuse_wgrad_accumulation", True, "gradient_accumulation_fusion=False"),
    "delayed": (ddp_config, "delay_wgrad_compute", True, "delay_wgrad_compute=False"),
    "deferred": (model_config, "defer_embedding_wgrad_compute", True, "defer_embedding_wgrad_compute=False"),
    "graphs": (model_config, "cuda_graph_impl", "local", 'cuda_graph_impl="none"'),
    "combined schedule": (
        model_config,
        "overlap_moe_expert_parallel_comm",
        True,
        "overlap_moe_expert_parallel_comm=False",
    ),
    "context": (model_config, "context_parallel_size", 2, "context_parallel_size=1"),
    "experts": (bias, "allreduce", False, "expert_model_parallel_size=1"),
    "split experts": (model_config, "num_moe_experts", 4, "num_moe_experts=None"),
    "averaged": (bias, "average_gradients_across_tp_domain", True, "tensor_model_parallel_size=1"),
    "fsdp": (ddp_config, "use_megatron_fsdp", True, "use_megatron_fsdp=False"),
    "instances": (ddp_config, "num_distributed_optimizer_instances", 2, "num_distributed_optimizer_instances=1"),
    "fp8": (ddp_config, "fp8_param_gather", True, "fp8_param_gather=False"),
    "precision-aware": (optimizer_config, "use_precision_aware_optimizer", True, "use_precision_aware_optimizer=False"),
    "offload": (optimizer_config, "optimizer_cpu_offload", True, "optimizer_cpu_offload=False"),
}
REFUSED_TO_LENA: dict[str, tuple[Callable[[Any, Any], Any], str, Any, str]] = {
    "no AdamW": (optimizer_config, "decoupled_weight_decay", False, "decoupled_weight_decay=True"),
    "muon": (optimizer_config, "optimizer", "muon", 'optimizer="adam" or "sgd"'),
}


def refusals() -> dict[str, tuple[str, str]]:
    """What each of them says, with the flag on rank 1 alone, by `wrap` and by `watch`."""
    found = {}
    with megatron(tensor=2) as (case, chunk, optimizer):
        for name, (owner, flag, value, _) in {**REFUSED, **REFUSED_TO_LENA}.items():
            with pytest.MonkeyPatch.context() as patch:
                if dist.get_rank() == 1:
                    patch.setattr(owner(chunk, optimizer), flag, value, raising=False)
                found[name] = (
                    error_of(optimizer, [chunk], **case.keys),
                    error_of(optimizer, [chunk], by=watch),
                )
    return found


def error_of(optimizer: Any, chunks: list[Any], by: Callable[..., Any] = wrap, **keys: Any) -> str:
    try:
        by(optimizer, chunks, **keys)
    except ds_lena.LenaError as error:
        return str(error)
    return ""


def test_what_is_not_exact_is_refused_on_every_rank_with_the_flag_to_set(ranks: Ranks) -> None:
    first, second = ranks.run(refusals)
    assert first == second
    assert {name: text for name, (*_, text) in (REFUSED | REFUSED_TO_LENA).items() if text not in first[name][0]} == {}
    assert {name: first[name][1] for name in REFUSED_TO_LENA} == dict.fromkeys(REFUSED_TO_LENA, "")
    in_the_watchs_name = [first[name][0].replace("LENA around", "ds_lena.watch around") for name in REFUSED]
    assert [first[name][1] for name in REFUSED] == in_the_watchs_name


def other_refusals() -> dict[str, str]:
    found = {}
    with megatron(tensor=2, split="megatron-sequence") as (case, chunk, optimizer):
        sum_partial_gradients(chunk.module)
        found["summed"] = error_of(optimizer, [chunk], **case.keys)
        found["no ddp"] = error_of(optimizer, [chunk.module], **case.keys)
        found["chunks"] = error_of(optimizer, [chunk, chunk], **case.keys)
        found["inner"] = error_of(optimizer.optimizer, [chunk], **case.keys)
        optimizer.chained_optimizers *= 2
        found["chained"] = error_of(optimizer, [chunk], **case.keys)
    with megatron() as (_, chunk, optimizer):
        found["lr"] = error_of(optimizer, [chunk], lr=1.0)
        found["betas"] = error_of(optimizer, [chunk], betas=[0.5, 0.5])
        found["base"] = error_of(optimizer, [chunk], base="lars")
        found["key"] = error_of(optimizer, [chunk], gain=2)
        found["steps"] = error_of(optimizer, [chunk])
        wrap(optimizer, chunk, warmup="none")
        found["twice"] = error_of(optimizer, [chunk], warmup="none")
    with megatron() as (_, chunk, optimizer):
        weight = chunk.module.output_layer.weight.requires_grad_(False)
        found["frozen"] = error_of(optimizer, [chunk], warmup="none")
        weight.requires_grad_(True)
        chunk.module.decoder.late = torch.nn.Parameter(torch.zeros(2))
        found["unfrozen"] = error_of(optimizer, [chunk], warmup="none")
    with megatron(tensor=2) as (_, chunk, optimizer):
        chunk.tp_group = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
        found["some ranks"] = error_of(optimizer, [chunk], warmup="none")
    with megatron(base="sgd") as (_, chunk, optimizer):
        found["nesterov"] = error_of(optimizer, [chunk], nesterov=True)
    return found


def test_other_misuse_is_refused(ranks: Ranks) -> None:
    first, second = ranks.run(other_refusals)
    assert first == second
    wanted = {
        "summed": "sum_partial_gradients() in Megatron's own loop",
        "no ddp": "wrapped in Megatron-core's DistributedDataParallel",
        "chunks": "[DistributedDataParallel, DistributedDataParallel]",
        "inner": "LENA: got AdamW in place of Megatron's optimizer",
        "chained": "Megatron has chained 2 optimizers",
        "lr": '"lr": 1.0, but Megatron\'s OptimizerConfig has lr = 0.002',
        "betas": "adam_beta1 and adam_beta2 = (0.9, 0.99)",
        "base": 'has optimizer="adam", whose state fits adamw and lamb',
        "key": 'unknown key "gain"',
        "steps": '"total_steps" is not known',
        "twice": "wrap() was called before",
        "nesterov": "Megatron's SGD has none",
        "some ranks": "2 ranks run, and Megatron's groups make 1 of them one model",
        "frozen": "a parameter was frozen",
        "unfrozen": '"decoder.late" was unfrozen',
    }
    assert {name: first[name] for name, text in wanted.items() if text not in first[name]} == {}


def loops_refused() -> dict[str, str]:
    """Loops that would not move the weights by the averaged gradient of the window."""
    found = {}
    for name in ("not finalized", "not zeroed", "no backward", "inner step"):
        with megatron() as (case, chunk, optimizer):
            wrap(optimizer, [chunk], **case.keys)
            update_of(case, chunk, optimizer, 0)
            if name != "not zeroed":
                chunk.zero_grad_buffer()
            optimizer.zero_grad()
            if name != "no backward":
                chunk(*case.batch(1, dist.get_rank(), 0)).backward()
            if name != "not finalized":
                chunk.finish_grad_sync()
            try:
                (optimizer.optimizer if name == "inner step" else optimizer).step()
            except ds_lena.StateError as error:
                found[name] = str(error)
    return found


def test_a_loop_that_loses_or_keeps_gradients_is_refused(ranks: Ranks) -> None:
    first, second = ranks.run(loops_refused)
    assert first == second
    assert "finalize_model_grads(model_chunks)" in first["not finalized"]
    assert "zero_grad_buffer()" in first["not zeroed"]
    assert "no backward pass was seen" in first["no backward"]
    assert "step() of the optimizer that wrap() returned" in first["inner step"]


def parts_not_added_up() -> str:
    """Megatron's finalize_model_grads() is left out: only the data-parallel reduction is done."""
    with megatron(tensor=2, split="megatron-sequence") as (case, chunk, optimizer):
        wrap(optimizer, [chunk], **case.keys)
        chunk(*case.batch(0, 0, 0)).backward()
        chunk.finish_grad_sync()
        return error_of_step(optimizer)


def error_of_step(optimizer: Any) -> str:
    try:
        optimizer.step()
    except ds_lena.LenaError as error:
        return str(error)
    return ""


def test_copies_that_would_drift_apart_are_refused_at_the_first_update(ranks: Ranks) -> None:
    first, second = ranks.run(parts_not_added_up)
    assert first == second
    assert "is not the same on all tensor-parallel ranks" in first and "finalize_model_grads(model_chunks)" in first


def with_calculator() -> tuple[str, float]:
    """What a wrong micro-batch size is told, and the base batch in micro-batches, where Megatron knows their size."""
    from megatron.core import num_microbatches_calculator as calculator

    calculator.init_num_microbatches_calculator(dist.get_rank(), None, 8, 2, dist.get_world_size())
    try:
        with megatron() as (case, chunk, optimizer):
            wrong = error_of(optimizer, [chunk], **case.keys, micro_batch_size=4)
            wrap(optimizer, [chunk], **case.keys, base_batch_size=6)
            return wrong, update_of(case, chunk, optimizer, 0)["base"]
    finally:
        calculator.unset_num_microbatches_calculator()


def test_megatron_is_asked_for_the_size_of_a_micro_batch(ranks: Ranks) -> None:
    for wrong, base in ranks.run(with_calculator):
        assert '"micro_batch_size": 4' in wrong and "has 2" in wrong and base == 3.0


# -- going on ---------------------------------------------------------------------------------------------------------


def resumed(folder: str, split: str, base: str, config: dict[str, Any], precision: str, tensor: int) -> list[bool]:
    """Whether a run that goes on from Megatron's checkpoint ends with the same report and weights, bit by bit."""
    fields = {"base": base, "config": config, "precision": precision, "tensor": tensor}
    path = f"{folder}/{base}-{dist.get_rank()}"
    with megatron(split, **fields) as (case, chunk, optimizer):
        wrap(optimizer, [chunk], **case.keys)
        for update in range(2):
            update_of(case, chunk, optimizer, update)
        torch.save({"model": chunk.state_dict(), "optimizer": optimizer.state_dict()}, path)
        if config:
            optimizer.save_parameter_state(f"{folder}/{base}-state")
        reports = [update_of(case, chunk, optimizer, update) for update in (2, 3)]
        weights = [p.detach().clone() for p in chunk.parameters()]
    with megatron(split, **fields) as (case, chunk, optimizer):
        wrap(optimizer, [chunk], **case.keys)
        saved = torch.load(path, weights_only=False)
        chunk.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if config:
            with torch.no_grad():  # in fp32 Megatron's own loading fails without
                optimizer.load_parameter_state(f"{folder}/{base}-state")
        again = [update_of(case, chunk, optimizer, update) for update in (2, 3)]
        return [again == reports, all(map(torch.equal, weights, chunk.parameters()))]


@pytest.mark.parametrize(
    ("split", "base", "config", "precision", "tensor"),
    [
        ("megatron", "adamw", {}, "fp32", 1),
        ("megatron-sequence", "lars", {}, "bf16", 2),
        ("megatron", "lamb", SHARDED, "bf16", 1),
        ("megatron", "adamw", SHARDED, "fp32", 1),
    ],
)
def test_a_resumed_run_is_the_unbroken_run(
    ranks: Ranks, tmp_path: Path, split: str, base: str, config: dict[str, Any], precision: str, tensor: int
) -> None:
    assert ranks.run(resumed, str(tmp_path), split, base, config, precision, tensor) == [[True, True]] * 2


def gone_on_from_stock(path: str) -> tuple[int, list[float], bool]:
    """LENA's count of updates, those of the moments, and whether these are there, after Megatron's own AdamW."""
    with megatron() as (case, chunk, optimizer):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        chunk(*case.batch(0, dist.get_rank(), 0)).backward()
        chunk.finish_grad_sync()
        optimizer.step()
        torch.save(optimizer.state_dict(), f"{path}-{dist.get_rank()}")
        moments = [state["exp_avg"] for state in optimizer.optimizer.state.values()]
    with megatron() as (case, chunk, optimizer):
        wrap(optimizer, [chunk], **case.keys)
        optimizer.load_state_dict(torch.load(f"{path}-{dist.get_rank()}", weights_only=False))
        kept = [state["exp_avg"].clone() for state in optimizer.optimizer.state.values()]
        report = update_of(case, chunk, optimizer, 1)
        counts = {float(state["step"]) for state in optimizer.optimizer.state.values()}
        return report["update"], sorted(counts), all(map(torch.equal, moments, kept))


def test_a_checkpoint_of_megatrons_own_adam_keeps_its_moments(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.run(gone_on_from_stock, str(tmp_path / "stock")) == [(1, [2.0], True)] * 2


def stock_resumed(path: str) -> str:
    """What loading says with Megatron's own AdamW in its distributed optimizer."""
    for is_first in (True, False):
        with megatron(config=SHARDED, precision="bf16") as (case, chunk, optimizer):
            chunk(*case.batch(0, dist.get_rank(), 0)).backward()
            chunk.finish_grad_sync()
            optimizer.step()
            if is_first:
                optimizer.save_parameter_state(path)
                saved = optimizer.state_dict()
                continue
            optimizer.load_state_dict(saved)
            try:
                optimizer.load_parameter_state(path)
            except KeyError as error:
                return str(error)
    return ""


def test_megatron_still_fails_to_load_what_it_saved_without_a_fused_optimizer(ranks: Ranks, tmp_path: Path) -> None:
    """If this fails, `StepInGroups` is needed for fused optimizers alone."""
    assert ranks.run(stock_resumed, str(tmp_path / "state")) == ["'step'"] * 2


class FusedAdam(torch.optim.Optimizer):
    """As Transformer Engine's and Apex' keep their state: no count in it, but one in each group that has parameters."""

    def __init__(self, params: Any, lr: float, weight_decay: float, betas: Any, eps: float, adam_w_mode: bool) -> None:
        super().__init__(
            params, {"lr": lr, "bias_correction": True, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )


def resumed_fused(folder: str, config: dict[str, Any]) -> list[bool]:
    """The same where Megatron has found one of these libraries."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    with pytest.MonkeyPatch.context() as patch:
        for module, names in (
            (optimizer, {"Adam": FusedAdam, "USING_PYTORCH_OPTIMIZER": False}),
            (distrib_optimizer, {"Adam": FusedAdam, "HAVE_APEX_OR_TE": True, "USING_TE_OPTIMIZER": True}),
        ):
            for name, value in names.items():
                patch.setattr(module, name, value)
        with megatron(config=config) as (case, chunk, made_of_it):
            wrap(made_of_it, [chunk], **case.keys)
            update_of(case, chunk, made_of_it, 0)
            state, groups = made_of_it.optimizer.state, made_of_it.param_groups
            is_as_theirs = all(set(own) == {"exp_avg", "exp_avg_sq"} for own in state.values()) and bool(state)
            is_as_theirs = is_as_theirs and [group["step"] for group in groups] == [1] * len(groups)
        return [is_as_theirs, *resumed(folder, "megatron", "adamw", config, "fp32", 1)]


@pytest.mark.parametrize("config", [{}, SHARDED])
def test_the_state_is_that_of_a_fused_optimizer_where_megatron_has_one(
    ranks: Ranks, tmp_path: Path, config: dict[str, Any]
) -> None:
    assert ranks.run(resumed_fused, str(tmp_path), config) == [[True, True, True]] * 2


def checkpointed(folder: str, config: dict[str, Any]) -> list[bool]:
    """The same by Megatron's distributed checkpoints, into an optimizer that has made no update."""
    from megatron.core import dist_checkpointing

    # Megatron writes in processes of its own, which those of this test must not start, being daemons.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    metadata = {"distrib_optim_sharding_type": "fully_reshardable"}

    def sharded(chunk: Any, optimizer: Any, is_loading: bool) -> dict[str, Any]:
        model = chunk.module.sharded_state_dict()
        return {
            "model": model,
            "optimizer": optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata),
        }

    with megatron(config=config, tensor=2, precision="bf16") as (case, chunk, optimizer):
        wrap(optimizer, [chunk], **case.keys)
        for update in range(2):
            update_of(case, chunk, optimizer, update)
        dist_checkpointing.save(sharded(chunk, optimizer, False), folder)
        reports = [update_of(case, chunk, optimizer, update) for update in (2, 3)]
        weights = [p.detach().clone() for p in chunk.parameters()]
    with megatron(config=config, tensor=2, precision="bf16") as (case, chunk, optimizer):
        wrap(optimizer, [chunk], **case.keys)
        loaded = dist_checkpointing.load(sharded(chunk, optimizer, True), folder)
        chunk.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])
        again = [update_of(case, chunk, optimizer, update) for update in (2, 3)]
        return [again == reports, all(map(torch.equal, weights, chunk.parameters()))]


@pytest.mark.parametrize("config", [{}, SHARDED])
def test_megatrons_distributed_checkpoints_hold_lenas_state(
    ranks: Ranks, tmp_path: Path, config: dict[str, Any]
) -> None:
    assert ranks.run(checkpointed, str(tmp_path), config) == [[True, True]] * 2
