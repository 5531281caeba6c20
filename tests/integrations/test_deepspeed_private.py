"""What ds_lena takes from inside of DeepSpeed: every private name, and the facts that it is written around.

After an upgrade of DeepSpeed this file says what has changed. Names and facts were seen with `SEEN_WITH`.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_lena.integrations.deepspeed import _internals
from ds_lena.integrations.deepspeed._internals.engine import EngineView
from ds_lena.update.trust_ratio import clip_coefficient
from tests.integrations._engines import Net, config, engine, train, without_optimizer
from tests.integrations._ranks import Ranks

ENGINE = (
    "_backward_epilogue",
    "_config",
    "_configure_lr_scheduler",
    "_configure_optimizer",
    "_get_all_ckpt_names",
    "_get_ckpt_name",
    "_get_optimizer_ckpt_name",
    "_get_zero_ckpt_name",
    "_get_zero_param_shapes",
    "_is_gradient_accumulation_boundary",
    "_load_zero_checkpoint",
    "_take_model_step",
    "autotp_size",
    "basic_optimizer",
    "communication_data_type",
    "bfloat16_enabled",
    "checkpoint_engine",
    "checkpoint_mp_rank",
    "config",
    "destroy",
    "dp_world_size",
    "bf16_master_weights_and_gradients",
    "enable_backward_allreduce",
    "fp16_enabled",
    "fp16_master_weights_and_gradients",
    "get_data_types",
    "global_rank",
    "global_samples",
    "gradient_accumulation_steps",
    "gradient_average",
    "gradient_clipping",
    "gradient_predivide_factor",
    "has_moe_layers",
    "inside_no_sync_ctxt",
    "is_gradient_accumulation_boundary",
    "is_deepcompile_enabled",
    "load_checkpoint",
    "load_module_state_dict",
    "load_moe_state_dict",
    "load_universal_checkpoint",
    "lr_scheduler",
    "managed_gradient_accumulation",
    "micro_steps",
    "module",
    "monitor",
    "mpu",
    "mp_world_size",
    "num_experts",
    "optimizer",
    "optimizer_name",
    "optimizer_params",
    "param_names",
    "pipeline_parallelism",
    "postscale_gradients",
    "save_checkpoint",
    "set_train_batch_size",
    "seq_data_parallel_group",
    "seq_dp_world_size",
    "sequence_parallel_size",
    "torch_autocast_dtype",
    "torch_autocast_enabled",
    "tput_timer",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "was_step_applied",
    "zero_force_ds_cpu_optimizer",
    "zero_grad",
    "zero_optimization",
    "zenflow",
    "zero_optimization_stage",
)
ZERO_CONFIG = (
    "contiguous_gradients",
    "elastic_checkpoint",
    "offload_optimizer",
    "offload_param",
    "overlap_comm",
    "reduce_scatter",
    "round_robin_gradients",
    "zero_hpz_partition_size",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
    "zero_quantized_weights",
)
ZERO_1_2 = (
    "_coalesce_grad_reduction",
    "_restore_from_bit16_weights",
    "_use_compact_grad_partition_buffer",
    "all_grad_tensors",
    "averaged_gradients",
    "bit16_groups",
    "clip_grad",
    "dp_process_group",
    "load_state_dict",
    "overlap_comm",
    "partition_gradients",
    "partition_size",
    "real_dp_process_group",
    "reduce_bucket_size",
    "round_robin_bit16_groups",
    "round_robin_bit16_offsets",
    "single_partition_of_fp32_groups",
    "state_dict",
    "update_lp_params",
)
OFFLOAD_1_2 = (
    "_epilogue_ran_this_backward",
    "_finalize_cpu_offload_gradient_accumulation",
    "_offload_accumulated_param_ids",
    "_wait_for_offload_copies",
    "accumulated_grads_in_cpu",
    "cpu_offload",
    "get_gradient_for_reduction",
    "get_param_id",
    "is_gradient_accumulation_boundary",
    "norm_for_param_grads",
    "reset_cpu_buffers",
)
OFFLOAD_3 = (
    "_finalize_offload_gradient_accumulation",
    "_offload_boundary_param_ids",
    "get_param_id",
    "norm_for_param_grads",
    "offload_optimizer",
    "reset_cpu_buffers",
    "swap_optimizer",
)
NVME = (
    "_optimizer_states_and_gradient_swap_in",
    "_release_swap_buffers",
    "_swappable_optimizer_subgroup",
    "optimizer_swapper",
)
MUON_1_2 = ("_is_muon_group", "all_grad_tensors", "get_flat_partition")
LOSS_SCALE = ("_update_scale", "loss_scale", "step")
BF16 = (
    "_restore_from_bit16_weights",
    "bf16_groups",
    "clip_grad",
    "dp_process_group",
    "fp32_groups_flat_partition",
    "fp32_groups_gradient_flat_partition",
    "fp32_groups_has_gradients",
    "immediate_grad_update",
    "real_dp_process_group",
    "update_lp_params",
)
ZERO_3 = (
    "_restore_from_bit16_weights",
    "_coalesce_grad_reduction",
    "_epilogue_ran_this_backward",
    "averaged_gradients",
    "clip_grad",
    "dp_process_group",
    "fp16_groups",
    "fp32_partitioned_groups_flat",
    "grad_partitions_flat_buffer",
    "micro_step_id",
    "reduce_bucket_size",
)
ZERO_3_PARAMETER = ("ds_numel", "ds_process_group", "ds_shape", "ds_tensor", "partition_numel")
UNFUSED = ("clip_grad", "fp16_groups", "fp32_groups", "load_state_dict", "refresh_fp32_params")
LAYOUTS = {
    # (stage, precision): the wrapper's class, its names, those of a parameter
    (0, "fp32"): ("LENA", (), ()),
    (0, "bf16"): ("FP16_UnfusedOptimizer", UNFUSED, ()),
    (1, "fp32"): ("DeepSpeedZeroOptimizer", ZERO_1_2, ("grad_accum",)),
    (1, "bf16"): ("DeepSpeedZeroOptimizer", ZERO_1_2, ("grad_accum",)),
    (1, "bf16-fp32"): ("BF16_Optimizer", BF16, ()),
    (2, "fp32"): ("DeepSpeedZeroOptimizer", ZERO_1_2, ()),
    (2, "bf16-fp32"): ("DeepSpeedZeroOptimizer", ZERO_1_2, ()),
    (3, "fp32"): ("DeepSpeedZeroOptimizer_Stage3", ZERO_3, ZERO_3_PARAMETER),
    (3, "bf16"): ("DeepSpeedZeroOptimizer_Stage3", ZERO_3, ZERO_3_PARAMETER),
    (1, "fp32 + offload"): ("DeepSpeedZeroOptimizer", (*ZERO_1_2, *OFFLOAD_1_2, *LOSS_SCALE), ()),
    (3, "fp32 + offload"): ("DeepSpeedZeroOptimizer_Stage3", (*ZERO_3, *OFFLOAD_3, *NVME, *LOSS_SCALE), ("ds_id",)),
}
ELSEWHERE = {
    "DeepSpeedEngine",  # deepspeed.runtime.engine
    "_param_dict",  # engine._config
    "data_efficiency_config",  # engine._config
    "device",  # of an offload configuration
    "ratio",
    "super_offload",
    "ds_id",
    "enabled",  # engine._config.expert_parallel_config
    "expert_parallel_config",  # engine._config
    "group_name",  # a mark of an expert's parameter
    "weight_quantization_config",  # engine._config
    "zero_config",  # engine._config
    "get_context_parallel_world_size",  # the user's mpu
    "_SEQUENCE_PARALLEL_GROUP",  # DeepSpeed's mpu for Ulysses
    "initialize_sequence_parallel",
    "seq_parallel_group",  # an engine with that mpu
    "model_parallel",  # a mark of a parameter, by users of older versions
    "partition_dim",  # a mark of a parameter, by Megatron
    "tied_comms",  # of a PipelineModule
    "tensor_model_parallel",  # a mark of a parameter, by Megatron and AutoTP
    "total_num_steps",  # DeepSpeed's schedulers that decay
    "param_groups",  # torch
    "register_forward_pre_hook",  # torch
}
PINNED = {
    *ENGINE,
    *ZERO_CONFIG,
    *ZERO_1_2,
    *BF16,
    *ZERO_3,
    *ZERO_3_PARAMETER,
    *UNFUSED,
    *OFFLOAD_1_2,
    *OFFLOAD_3,
    *NVME,
    *LOSS_SCALE,
    *MUON_1_2,
    *ELSEWHERE,
    "grad_accum",
    "ds_grad_is_ready",
}


def where() -> str:
    import deepspeed

    return f"seen with DeepSpeed {_internals.SEEN_WITH}, installed is {deepspeed.__version__}"


# -- names -------------------------------------------------------------------------------------------------------------


def names_of(stage: int, precision: str) -> tuple[str, list[str]]:
    """The class of the wrapper, and which names are missing in this layout."""
    with engine(config(stage, precision)) as made:
        _, of_wrapper, of_parameter = LAYOUTS[stage, precision]
        expected = [
            ("engine", made, ENGINE),
            ("engine._config.zero_config", made._config.zero_config, ZERO_CONFIG),
            ("engine.optimizer", made.optimizer, of_wrapper),
            ("parameter", next(made.module.parameters()), of_parameter),
        ]
        missing = [f"{what}.{name}" for what, thing, names in expected for name in names if not hasattr(thing, name)]
        return type(made.optimizer).__name__, missing


@pytest.mark.parametrize(("stage", "precision"), LAYOUTS)
def test_each_layout_has_the_wrapper_and_the_names_that_are_read(ranks: Ranks, stage: int, precision: str) -> None:
    for wrapper, missing in ranks.run(names_of, stage, precision):
        assert wrapper == LAYOUTS[stage, precision][0], where()
        assert missing == [], where()


def seam() -> dict[str, Any]:
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.lr_schedules import WarmupCosineLR, WarmupDecayLR
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    methods = (
        "_backward_epilogue",
        "_configure_optimizer",
        "_configure_lr_scheduler",
        "_take_model_step",
        "was_step_applied",
        "destroy",
        "set_train_batch_size",
        "save_checkpoint",
    )
    signatures = {name: list(inspect.signature(getattr(DeepSpeedEngine, name)).parameters) for name in methods}
    schedulers = [scheduler.__init__.__code__.co_varnames for scheduler in (WarmupDecayLR, WarmupCosineLR)]
    return {
        "signatures": signatures,
        "list of optimizers": type(ZERO_SUPPORTED_OPTIMIZERS).__name__,
        "schedulers know the length": all("total_num_steps" in names for names in schedulers),
    }


def test_the_methods_that_are_wrapped_take_what_they_took(ranks: Ranks) -> None:
    found = ranks.run(seam)[0]
    assert found["signatures"] == {
        "_backward_epilogue": ["self"],
        "_configure_optimizer": ["self", "client_optimizer", "model_parameters"],
        "_configure_lr_scheduler": ["self"],
        "_take_model_step": ["self", "lr_kwargs"],
        "was_step_applied": ["self"],
        "destroy": ["self"],
        "set_train_batch_size": ["self", "train_batch_size"],
        "save_checkpoint": ["self", "save_dir", "tag", "client_state", "save_latest", "exclude_frozen_parameters"],
    }, where()
    assert found["list of optimizers"] == "list", where()
    assert found["schedulers know the length"], where()


def names_read(tree: ast.Module) -> Iterator[str]:
    """Attributes that the source reads of an engine, wrapper, configuration or parameter, by dot or by getattr."""
    theirs = {"engine", "engine_class", "engine_module", "wrapper", "zero", "_zero", "_wrapper", "config", "offload"}
    theirs |= {"parameter", "_config", "_engine", "mpu", "lr_scheduler"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner, name = node.value, node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
            owner, name = node.args[0], getattr(node.args[1], "value", "")
        else:
            continue
        if (owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")) in theirs:
            yield str(name)


def test_every_name_that_is_read_is_pinned_here() -> None:
    files = Path(_internals.__file__).parent.glob("*.py")
    found = {name for file in files for name in names_read(ast.parse(file.read_text()))}
    assert len(found) > 40, "the search finds names"
    ours = {name for name in found if name.startswith("ds_lena_")}
    assert sorted(name for name in found - PINNED - ours if not hasattr(torch.Tensor, name)) == []


def test_the_names_of_experts_are_there() -> None:
    from deepspeed.moe.experts import Experts
    from deepspeed.moe.utils import is_moe_param
    from deepspeed.utils import groups

    names = ("_get_expert_parallel_rank", "_get_expert_parallel_world_size", "_get_expert_data_parallel_group")
    assert [name for name in names if not hasattr(groups, name)] == [], where()
    layer = Experts(torch.nn.Linear(1, 1), 2, "a group")
    assert len(layer.deepspeed_experts) == 2, where()
    assert all(is_moe_param(p) and p.group_name == "a group" for p in layer.parameters()), where()


def test_the_optimizer_on_nvme_takes_gradients_from_memory() -> None:
    from deepspeed.runtime.swap_tensor.optimizer_utils import OptimizerStateSwapInfo, OptimizerSwapper

    assert "self.swap_params_info = {}" in inspect.getsource(OptimizerSwapper.__init__), where()
    flat = torch.zeros(4)
    flat.ds_id = "0_1"
    info = OptimizerStateSwapInfo(flat, 4, "folder", None)
    info.swapped_gradients, info.unswapped_gradients = {}, {1: torch.ones(2)}
    assert info.has_gradients(), where()
    info.read_unswapped_gradients(flat)
    assert flat.tolist() == [0, 1, 1, 0], where()


# -- facts -------------------------------------------------------------------------------------------------------------


class Counting(torch.optim.AdamW):
    """How often `step` is called, and with how many tensors in how many groups."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=1e-2)
        self.calls: list[list[int]] = []

    def step(self, closure: Any = None) -> Any:
        self.calls.append([len(group["params"]) for group in self.param_groups])
        return super().step(closure)


def calls_of_step(stage: int, precision: str, **zero: Any) -> tuple[list[list[int]], list[list[int]]]:
    """The calls of the inner optimizer's `step` while an engine with two groups is made, and in one update."""
    model = Net()
    optimizer = Counting([{"params": model.left.parameters()}, {"params": model.right.parameters()}])
    entries = without_optimizer(config(stage, precision, zero=zero), zero_allow_untested_optimizer=True)
    with engine(entries, model, optimizer=optimizer) as made:
        before, optimizer.calls = optimizer.calls, []
        train(made, range(1))
        return before, optimizer.calls


@pytest.mark.parametrize(
    ("layout", "wanted"),
    [
        ((0, "fp32"), ([], [[6, 6]])),
        ((0, "bf16"), ([[6, 6]], [[6, 6]])),  # once at construction, with zero gradients
        ((1, "bf16-fp32"), ([], [[1, 1]])),
        ((2, "fp32"), ([], [[1], [1]])),  # once per group
        ((3, "fp32"), ([], [[1, 0], [0, 1]])),  # once per sub-group
    ],
    ids=str,
)
def test_who_calls_the_inner_step_and_with_what(ranks: Ranks, layout: Any, wanted: Any) -> None:
    for calls in ranks.run(calls_of_step, *layout):
        assert calls == wanted, where()


def test_where_muon_s_update_takes_the_place_of_the_gradient() -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    taken = list(inspect.signature(DeepSpeedZeroOptimizer.get_flat_partition).parameters)
    assert taken[:2] == ["self", "tensor_list"] and "param_group_idx" in taken, where()
    assert list(inspect.signature(DeepSpeedZeroOptimizer._is_muon_group).parameters) == ["self", "tensor_list"], where()
    source = inspect.getsource(DeepSpeedZeroOptimizer)
    calls = re.findall(r"= self\.get_flat_partition\((.*?)\)\n", source, flags=re.DOTALL)
    assert len(calls) == 2 and all("param_group_idx=i" in call for call in calls), where()


def default_clipping() -> float:
    entries = config(2)
    del entries["gradient_clipping"]
    with engine(entries) as made:
        return float(made.gradient_clipping())


def test_gradients_are_clipped_unless_told_otherwise(ranks: Ranks) -> None:
    assert ranks.run(default_clipping) == [1.0, 1.0], where()


def coefficients(norm: float) -> tuple[float, float]:
    """What DeepSpeed multiplies a gradient of this norm by, and what LENA takes it to be."""
    with engine(config(2, gradient_clipping=1e-6)) as made:
        gradient = torch.ones(1)
        made.optimizer.unscale_and_clip_grads([gradient], torch.tensor(norm))
        return float(gradient), float(clip_coefficient(torch.tensor(norm), EngineView(made).largest_norm()))


@pytest.mark.parametrize("norm", [0.0, 0.2e-6, 3e-6])
def test_clipping_adds_a_small_number_to_the_norm(ranks: Ranks, norm: float) -> None:
    for theirs, ours in ranks.run(coefficients, norm):
        assert theirs == pytest.approx(min(1.0, 1e-6 / (norm + 1e-6))), where()
        assert ours == pytest.approx(theirs)
