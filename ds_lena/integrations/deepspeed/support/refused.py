"""What LENA refuses, with the nearest supported choice."""

from __future__ import annotations

from .feature import Feature, Keys, not_a_fact

_CHECKPOINTING = "tests/unit/test_hooks_checkpointing.py"
_EXPERTS = "tests/integrations/test_experts.py"
_MISUSE = "tests/integrations/test_misuse.py"
_PARAMETERS = "tests/unit/test_optimizer_parameters.py"
_TENSOR = "tests/integrations/test_tensor_parallel.py"
_PIPELINE = "tests/integrations/test_pipeline.py"
_SEQUENCE = "tests/integrations/test_sequence_parallel.py"
_UNSUPPORTED = "tests/integrations/test_unsupported.py"
_WINDOWS = "tests/integrations/test_window.py"


def _refused(what: str, instead: str, test: str, keys: Keys = ()) -> Feature:
    return Feature(what, not_a_fact, instead=instead, test=test, keys=keys)


_ON_CPU = 'set its "device" to "cpu"'
_NVME_PARAM = ("nvme_path", "buffer_count", "buffer_size", "max_in_cpu")

REFUSED: tuple[Feature, ...] = (
    Feature(
        "ZeRO 0, fp16",  # SGD with a loss scale of 128 goes 1/128 of the way
        lambda facts: facts.fp16 and facts.stage == 0,
        instead='use ZeRO 1-3, or "bf16": {"enabled": true} (at ZeRO 0 DeepSpeed divides the gradients by a loss scale '
        "that it has not multiplied by)",
    ),
    Feature(
        '"torch_autocast" with fp16',
        lambda facts: facts.autocasts_to_fp16,
        instead='set its "dtype" to "bfloat16"',
    ),
    Feature(
        '"fp16_master_weights_and_grads"',
        lambda facts: facts.fp16 and facts.low_precision_masters,
        instead="set it to false",
        keys=("fp16.fp16_master_weights_and_grads",),
    ),
    Feature(
        '"bf16_master_weights_and_grads" with "offload_optimizer"',
        lambda facts: facts.bf16 and facts.low_precision_masters and facts.offload_optimizer != "none",
        instead="leave out one of them",
    ),
    Feature(
        '"offload_optimizer" to NVMe below ZeRO 3',
        lambda facts: facts.offload_optimizer == "nvme" and facts.stage < 3,
        instead=f"{_ON_CPU}, where DeepSpeed has it there all the same; or use ZeRO 3",
    ),
    _refused(
        'load_checkpoint() with "offload_optimizer" to NVMe (DeepSpeed loads no moments there)',
        _ON_CPU,
        "tests/integrations/test_nvme.py::test_a_checkpoint_is_refused_and_it_is_said_at_the_start",
    ),
    _refused(
        '"offload_optimizer" to NVMe with base lamb or lars',
        f'{_ON_CPU}, or "base" to "adamw" or "sgd"',
        "tests/integrations/test_unsupported.py::test_trust_ratios_are_refused_on_nvme",
    ),
    Feature(
        '"offload_param" to NVMe',
        lambda facts: facts.offload_param == "nvme",
        instead=_ON_CPU,
        keys=tuple(f"zero_optimization.offload_param.{name}" for name in _NVME_PARAM),
    ),
    Feature(
        '"offload_optimizer" with a "ratio" below 1',
        lambda facts: facts.offload_ratio != 1.0,
        instead="leave it out",
        keys=("zero_optimization.offload_optimizer.ratio",),
    ),
    Feature(
        '"super_offload"',
        lambda facts: facts.super_offload,
        instead="leave it out",
        keys=(
            "zero_optimization.offload_optimizer.super_offload",
            "zero_optimization.offload_optimizer.cpuadam_cores_perc",
        ),
    ),
    Feature(
        '"zenflow"',
        lambda facts: facts.zenflow,
        instead="remove the entry",
        test=f"{_UNSUPPORTED}::test_zenflow_is_refused_too_though_it_cannot_start_here",
        keys=("zero_optimization.zenflow*",),
    ),
    Feature(
        "a DualPipeVModule",
        lambda facts: facts.dual_pipe,
        instead="use a PipelineModule",
        test=f"{_PIPELINE}::test_a_dual_pipe_is_refused",
    ),
    # Names are local to a stage there: layers of two stages would be taken for one.
    Feature(
        "an mpu with several pipeline stages and a model that is no PipelineModule",
        lambda facts: facts.stages > 1 and not facts.pipelined,
        instead="a PipelineModule, with a PipeModelDataParallelTopology for tensor parallelism beside it",
        test=f"{_TENSOR}::test_stages_without_a_pipeline_module_are_refused",
    ),
    Feature(
        "AutoTP with a PipelineModule",
        lambda facts: facts.autotp and facts.pipelined,
        instead="layers that are split themselves, as Megatron-core's, with a PipeModelDataParallelTopology",
        test=f"{_PIPELINE}::test_autotp_in_a_pipeline_is_refused",
    ),
    _refused(
        "a stage of a pipeline that hands on several tensors, or trains nothing",
        "another partition_method",
        f"{_PIPELINE}::test_a_stage_that_hands_on_two_tensors_is_refused_on_every_rank",
    ),
    _refused(
        "lamb or lars with gradient_clipping at ZeRO 0, in a pipeline, or tensor-parallel in bf16 (DeepSpeed clips by "
        "the norm of the first rank's part)",
        "use ZeRO 1, or switch clipping off",
        f"{_PIPELINE}::test_trust_ratios_with_clipping_at_zero_0_are_refused",
    ),
    Feature(
        "AutoEP: the entry expert_parallel",
        lambda facts: facts.auto_ep,
        instead="deepspeed.moe.layer.MoE, or ZeRO 2 or 3 without the entry, with set_z3_leaf_modules at ZeRO 3",
        test=f"{_EXPERTS}::test_auto_ep_does_not_start",
        keys=("expert_parallel*",),
    ),
    Feature(
        "layers of deepspeed.moe with tensor, pipeline or sequence parallelism",
        lambda facts: facts.experts and facts.tensor_ranks * facts.stages * facts.sequence_ranks > 1,
        instead="data and expert parallelism only",
        test=f"{_EXPERTS}::test_experts_with_another_axis_are_refused",
    ),
    Feature(
        'layers of deepspeed.moe at ZeRO 1 with "contiguous_gradients": false (DeepSpeed averages different experts)',
        lambda facts: facts.experts and facts.stage == 1 and not facts.contiguous_gradients,
        instead="leave it out",
        test=f"{_EXPERTS}::test_gradients_that_are_not_contiguous_are_refused",
    ),
    _refused(
        '"variant": "authors-code" with layers of deepspeed.moe',
        '"variant": "default"',
        f"{_EXPERTS}::test_the_authors_code_is_refused",
    ),
    _refused(
        "layers of deepspeed.moe with several ep_size, whose parameter groups have another order on another rank",
        "set PYTHONHASHSEED to one number for all ranks",
        f"{_EXPERTS}::test_groups_of_experts_in_another_order_on_another_rank_are_refused",
    ),
    _refused(
        "lamb or lars with gradient_clipping at ZeRO 0, with layers of deepspeed.moe (DeepSpeed clips by a norm "
        "without the experts, or by the mean of the ranks' norms)",
        "use ZeRO 1, or switch clipping off",
        f"{_EXPERTS}::test_trust_ratios_with_clipping_at_zero_0_are_refused",
    ),
    Feature(
        "sequence parallelism by mesh_param, or by data_parallel_size and sequence_parallel_size in the JSON "
        "(DeepSpeed does not average over the sequence-parallel ranks, and their weights drift apart)",
        lambda facts: facts.averages_apart,
        instead="call parallel_state_sp.initialize_sequence_parallel(size) of deepspeed.runtime.sequence_parallel, and "
        "give deepspeed.initialize mpu=parallel_state_sp",
        test=f"{_SEQUENCE}::test_a_mesh_is_refused",
        keys=("sequence_parallel_size", "data_parallel_size"),
    ),
    Feature(
        '"sequence_parallel_size" without "data_parallel_size" (DeepSpeed makes no groups for it, and takes the ranks '
        "of a sequence for replicas)",
        lambda facts: facts.only_sequence_size,
        instead="leave it out; for sequence parallelism give deepspeed.initialize mpu=parallel_state_sp",
        test=f"{_SEQUENCE}::test_a_size_alone_is_refused",
    ),
    Feature(
        "parallel groups of Megatron-core of which the engine does not know",
        lambda facts: facts.unknown_parts,
        instead="give deepspeed.initialize mpu=parallel_state of megatron.core",
        test=f"{_TENSOR}::test_groups_of_megatron_that_the_engine_does_not_know_are_refused",
    ),
    Feature(
        "sequence-parallel ranks of which the engine does not know",
        lambda facts: facts.unknown_sequence,
        instead="give deepspeed.initialize mpu=parallel_state_sp, and leave out tensor_parallel",
        test=f"{_SEQUENCE}::test_groups_that_the_engine_does_not_know_are_refused",
    ),
    Feature(
        "sequence parallelism together with tensor or pipeline parallelism",
        lambda facts: facts.sequence_ranks > 1 and facts.tensor_ranks * facts.stages > 1,
        instead="use one of them",
        test=f"{_SEQUENCE}::test_tensor_parallelism_beside_it_is_refused",
    ),
    Feature(
        "sequence parallelism at ZeRO 1 in bf16 with fp32 accumulation (DeepSpeed's step fails on all but the first "
        "rank of a sequence)",
        lambda facts: facts.sequence_ranks > 1 and facts.stage == 1 and facts.bf16 and facts.fp32_accumulation,
        instead='use ZeRO 2 or 3, or "data_types": {"grad_accum_dtype": "bf16"}',
        test=f"{_SEQUENCE}::test_where_deepspeed_still_fails_it_is_refused",
    ),
    Feature(
        'sequence parallelism with "reduce_scatter": false at ZeRO-3 (DeepSpeed divides the gradients of large tensors '
        "by another number of ranks there)",
        lambda facts: facts.sequence_ranks > 1 and facts.stage == 3 and not facts.reduce_scatter,
        instead="leave it out",
        test=f"{_SEQUENCE}::test_wrong_scales_are_refused",
    ),
    Feature(
        "context parallelism (DeepSpeed does not average over it)",
        lambda facts: facts.context_parallel,
        instead="leave context_parallel_size at 1",
        test=f"{_TENSOR}::test_context_parallelism_is_refused",
    ),
    Feature(
        "a model on some of the ranks only, with an mpu",
        lambda facts: facts.other_ranks,
        instead="an mpu whose data-parallel and tensor-parallel ranks are all ranks",
        test=f"{_TENSOR}::test_a_model_on_some_ranks_only_is_refused",
    ),
    Feature(
        '"zero_quantized_gradients"',
        lambda facts: facts.quantized_gradients,
        instead="set it to false",
        keys=("zero_optimization.zero_quantized_gradients",),
    ),
    Feature(
        '"zero_quantized_weights"',
        lambda facts: facts.quantized_weights,
        instead="set it to false",
        keys=("zero_optimization.zero_quantized_weights",),
    ),
    Feature(
        '"zero_quantized_nontrainable_weights"',
        lambda facts: facts.quantized_frozen_weights,
        instead="set it to false",
        keys=("zero_optimization.zero_quantized_nontrainable_weights",),
    ),
    Feature(
        '"weight_quantization"',
        lambda facts: facts.quantized_at_start,
        instead="remove the entry",
        keys=("weight_quantization*",),
    ),
    Feature(
        '"dynamic_batching", which makes micro-batches of several sizes',
        lambda facts: facts.dynamic_batching,
        instead="set it to false",
        keys=("data_efficiency.data_sampling.dynamic_batching*",),
    ),
    Feature(
        '"elastic_checkpoint"',
        lambda facts: facts.elastic_checkpoint,
        instead="set it to false",
        keys=("zero_optimization.elastic_checkpoint",),
    ),
    Feature(
        '"load_universal"',
        lambda facts: facts.universal_checkpoint,
        instead="leave it out: it is not needed, load_checkpoint loads the ordinary checkpoint on any number of ranks",
        keys=("checkpoint.load_universal",),
    ),
    Feature(
        '"deepcompile" (it reduces the gradients inside of the compiled backward pass, where no hook sees them)',
        lambda facts: facts.deepcompile,
        instead="use engine.compile() without it",
        keys=("compile*",),
    ),
    Feature(
        '"gradient_allreduce_op": "sum"',
        lambda facts: facts.sums_gradients,
        instead='use "mean"',
        keys=("gradient_allreduce_op",),
    ),
    # DeepSpeed 0.19.8 leaves out the multiplication after the reduction there, so the gradient is too small.
    Feature(
        '"gradient_predivide_factor": {predivide}, the number of ranks, at ZeRO-3 or with sequence parallelism '
        "(DeepSpeed scales wrongly there)",
        lambda facts: (
            (facts.stage == 3 or facts.sequence_ranks > 1) and facts.predivide != 1.0 and facts.predivide == facts.ranks
        ),
        instead="leave it out",
    ),
    Feature(
        "a model wrapped by DistributedDataParallel",
        lambda facts: facts.in_data_parallel,
        instead="give DeepSpeed the model itself",
    ),
    _refused(
        "compiled autograd",
        "torch.compile or engine.compile() without it",
        f"{_UNSUPPORTED}::test_compiled_autograd_is_refused_in_the_first_backward",
    ),
    _refused(
        "several backward passes for one micro-batch (under DeepSpeed)",
        "engine.backward(loss_1 + loss_2)",
        f"{_WINDOWS}::test_several_backward_passes_for_one_micro_batch_are_refused",
    ),
    _refused(
        "a loss that calls backward in its forward, at ZeRO 1 in bf16 with fp32 accumulation (DeepSpeed loses its "
        "gradient)",
        'use ZeRO 2 or 3, or "immediate_grad_update": true in the entry "bf16"',
        "tests/integrations/test_tiled_loss.py::test_a_gradient_that_deepspeed_loses_is_refused",
    ),
    _refused(
        "going on after an exception in a backward pass, at ZeRO 2 and 3, and with overlap_comm",
        "make a new engine and load a checkpoint",
        f"{_WINDOWS}::test_where_deepspeed_cannot_go_on_the_error_says_so",
    ),
    _refused(
        "a parameter that another DeepSpeed engine with LENA trains",
        "call destroy() on the first engine, or give each engine its own parameters",
        f"{_MISUSE}::test_two_engines_cannot_share_a_parameter",
    ),
    _refused(
        "a client optimizer of an engine that was destroyed",
        "make a new LENA",
        f"{_MISUSE}::test_an_optimizer_of_a_destroyed_engine_says_that_it_sees_nothing",
    ),
    _refused(
        "lamb or lars with gradient_clipping at ZeRO 0 in fp32, where LENA does not hold all trained parameters",
        "freeze the others, use ZeRO 1-3, or switch clipping off",
        f"{_UNSUPPORTED}::test_a_clipping_norm_that_trust_ratios_cannot_know_is_refused",
    ),
    _refused(
        "a weight that is shared by segments under activation checkpointing with use_reentrant=True",
        "use_reentrant=False, or exclude the weight",
        f"{_CHECKPOINTING}::test_a_weight_shared_by_reentrant_segments_is_refused_by_name",
    ),
    _refused(
        "a last layer inside activation checkpointing with use_reentrant=True",
        "use_reentrant=False, or keep the last layer outside",
        f"{_CHECKPOINTING}::test_a_model_inside_of_reentrant_segments_as_a_whole_is_refused",
    ),
    _refused(
        "FSDP, DTensor",
        "use DeepSpeed ZeRO 1-3, or DistributedDataParallel",
        f"{_PARAMETERS}::test_parameters_that_torch_shards_are_refused",
    ),
    _refused(
        "float16 or complex parameters in plain PyTorch",
        "use bfloat16, float32 or float64",
        f"{_PARAMETERS}::test_a_type_of_number_in_which_lena_would_not_be_exact_is_refused",
    ),
    _refused(
        "torch.amp.GradScaler",
        "use bfloat16, which needs no loss scaling",
        f"{_PARAMETERS}::test_a_gradient_scaler_is_refused",
    ),
    _refused(
        "one process with parameters on several devices",
        "use DeepSpeed ZeRO to spread the model",
        f"{_PARAMETERS}::test_a_model_on_two_devices_is_refused",
    ),
    _refused(
        "sparse gradients", "build the embedding with sparse=False", f"{_PARAMETERS}::test_a_sparse_gradient_is_refused"
    ),
    _refused(
        "plain PyTorch on several ranks without DDP's averaging: averaged by hand, LocalSGD, ZeroRedundancyOptimizer",
        "DistributedDataParallel, or DeepSpeed ZeRO 1; a model of some ranks only: their process_group",
        "tests/integrations/test_ranks_apart.py::test_it_is_one_error_on_every_rank",
    ),
    _refused(
        "parameters that are replaced or unfrozen after construction in plain PyTorch",
        "construct LENA after that, and load the old state_dict() into it",
        f"{_PARAMETERS}::test_a_parameter_that_is_unfrozen_after_construction_is_refused",
    ),
    _refused(
        "a hook by register_post_accumulate_grad_hook() of the user's own",
        "register_hook(), whose change LENA sees",
        "tests/unit/test_optimizer.py::test_a_hook_that_may_change_the_sum_is_refused",
    ),
    _refused(
        "gradients changed between the backward passes of an update, in plain PyTorch (looked for in the first update)",
        "a change after the last pass, or register_hook()",
        "tests/unit/test_optimizer.py::test_a_gradient_that_is_changed_between_the_passes_of_the_first_update_is_refused",
    ),
    _refused(
        "parameters in the optimizer's groups that are unfrozen after deepspeed.initialize (others: a warning)",
        "destroy() the engine, and give the model to a new one",
        "tests/integrations/test_groups.py::test_a_weight_that_is_unfrozen_after_initialize_is_refused_or_told",
    ),
    _refused(
        "add_param_group() after construction",
        "give all parameters to a new LENA, and load the old state_dict() into it",
        f"{_PARAMETERS}::test_a_group_that_is_added_later_is_refused",
    ),
)
