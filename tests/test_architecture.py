"""The plan of the house, checked on the source: who may import whom, who may talk to what, and what a user sees."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ds_lena
from ds_lena.keys import BASES

PACKAGE = Path(ds_lena.__file__).parent

FLOORS = (
    {"errors", "version", "keys", "recorded", "grad_stats", "schedule", "layouts", "update", "update.kernels",
     "update.kernels.programs"},
    {"page", "config", "layers", "grad_stats.norms", "grad_stats.backward", "grad_stats.placement", "grad_stats.reduce",
     "grad_stats.measurement", "growth", "alike", "saved_files",
     "layouts.layout", "update.rules.common"},
    {"parameters", "grad_stats.hooks", "grad_stats.agreement", "schedule.algorithm", "layouts.plain", "layouts.pieces",
     "update.segments", "sample_schedules",
     "update.rules.adamw", "update.rules.sgd"},
    {"update.kernels.table"},
    {"update.kernels.launch"},
    {"grad_stats.statistics", "schedule.authors_code", "schedule.clock", "schedule.carrier"},
    {"schedule.noise", "binding", "update.rules", "watch_config"},
    {"schedule.schedule", "meter", "advice", "update.apply"},
    {"schedule.checkpoint"},
    {"update.trust_ratio", "cost", "inspect", "watching"},
    {"plain_updates"},
    {"controller", "growing"},
    {"optimizer"},
    {"reporting", "integrations", "integrations._transformers_internals", "integrations.megatron.partial"},
    {*(f"integrations.deepspeed.{name}" for name in ("_internals", "_internals.cpu_adam", "_internals.grid",
                                                     "_internals.flat", "_internals.loss_scale", "exchange",
                                                     "_internals.saved",
                                                     "_internals.seam", "ownership")),
     *(f"integrations.megatron.{name}" for name in ("refused", "steps"))},
    {"integrations.deepspeed._internals.facts", "integrations.megatron._internals",
     *(f"integrations.deepspeed.axes.{name}" for name in ("expert", "pipeline", "sequence", "tensor"))},
    {"integrations.megatron.window",
     *(f"integrations.deepspeed.{name}" for name in ("_internals.engine", "_internals.bf16", "_internals.zero0",
                                                     "_internals.zero12", "_internals.zero3", "support.feature"))},
    {f"integrations.deepspeed.{name}" for name in ("_internals.zero12_muon", "_internals.zero12_offload",
                                                   "_internals.zero3_offload", "axes",
                                                   "frozen", "monitor", "window", "fitting", "differences", "nonfinite",
                                                   "support.refused",
                                                   "support.supported", "support.without_effect")},
    {"integrations.deepspeed.support", "integrations.deepspeed._internals.zero3_nvme", "integrations.megatron.bind",
     "integrations.deepspeed.reading"},
    {"integrations.deepspeed._internals.select", "integrations.deepspeed.filling",
     "integrations.megatron.attach", "integrations.megatron.watching",
     "integrations.deepspeed.finding"},
    {"integrations.deepspeed.bind", "integrations.deepspeed.reshard"},
    {"integrations.deepspeed.watch"},
    {"integrations.deepspeed.growth"},
    {"integrations.deepspeed", "integrations.deepspeed.attach", "integrations.megatron"},
    {"_registration", "noise"},
    {"batch", "integrations.transformers"},
    {"integrations.transformers_growth"},
    {"report"},
    {"__init__"},
    {"run"},
)  # fmt: skip
"""From the ground up: a module imports from lower floors only, so there is no cycle."""

FLOOR_OF = {module: height for height, floor in enumerate(FLOORS) for module in floor}
# A new rule may build on the two that are listed.
FLOOR_OF = {f"update.rules.{name}": FLOOR_OF["schedule.clock"] for name in BASES} | FLOOR_OF

INTERNALS = "integrations.deepspeed._internals"
RULE = {"update.rules.common", "update.rules", "grad_stats.norms"}
MAY_IMPORT = {
    "errors": set(),
    "keys": set(),
    "config": {"errors", "keys"},
    "growth": {"errors", "keys"},
    "sample_schedules": {"errors", "growth", "keys"},
    "layers": set(),
    "recorded": set(),
    # measure: tensors and placements, no wrapper and no engine
    "grad_stats.norms": {"errors", "recorded"},
    "grad_stats.backward": set(),
    "grad_stats.placement": set(),
    "grad_stats.measurement": set(),
    "grad_stats.reduce": set(),
    "grad_stats.hooks": {"errors", "grad_stats", "grad_stats.backward", "grad_stats.norms", "grad_stats.placement"},
    "grad_stats.agreement": {"errors", "grad_stats.reduce"},
    "grad_stats.statistics": {"grad_stats.measurement", "grad_stats.placement", "grad_stats.reduce", "recorded"},
    # decide: vectors only
    "schedule.algorithm": {"config", "grad_stats.measurement"},
    "schedule.authors_code": {"config", "grad_stats.measurement", "schedule.algorithm"},
    "schedule.clock": {"schedule", "schedule.algorithm"},
    "schedule.schedule": {"config", "errors", "layers", "grad_stats.measurement", "schedule",
                          "schedule.algorithm", "schedule.clock", "schedule.authors_code", "schedule.noise"},
    "schedule.carrier": set(),
    "schedule.noise": {"errors", "grad_stats.measurement", "layers", "schedule", "schedule.algorithm",
                       "schedule.clock"},
    "schedule.checkpoint": {"config", "errors", "keys", "schedule.clock", "schedule.noise", "schedule.schedule"},
    # where memory is: no statistics, no facts of the run
    "layouts.layout": set(),
    "layouts.plain": {"layouts.layout"},
    "layouts.pieces": {"errors"},
    **{f"{INTERNALS}.{name}": {"errors", "layouts.layout", INTERNALS, f"{INTERNALS}.flat"}
       for name in ("zero0", "zero12", "zero3", "bf16", "flat")},
    **{f"{INTERNALS}.{name}_offload": {"errors", "layouts.layout", f"{INTERNALS}.flat", f"{INTERNALS}.{name}"}
       for name in ("zero12", "zero3")},
    f"{INTERNALS}.zero3_nvme": {"layouts.layout", f"{INTERNALS}.zero3_offload"},
    f"{INTERNALS}.zero12_muon": {"grad_stats.norms", "layouts.layout", f"{INTERNALS}.zero12"},
    f"{INTERNALS}.loss_scale": set(),
    f"{INTERNALS}.cpu_adam": {"update.rules", "update.rules.adamw", "update.rules.common"},
    f"{INTERNALS}.saved": {"errors", "layers"},
    f"{INTERNALS}.grid": set(),
    f"{INTERNALS}.facts": {f"{INTERNALS}.grid"},
    f"{INTERNALS}.engine": {f"{INTERNALS}.facts", f"{INTERNALS}.grid"},
    # move: pieces and rates
    "update.segments": {"layouts.layout"},
    "update.kernels.programs": set(),
    "update.kernels.table": {"update.segments"},
    "update.kernels.launch": {"update.kernels", "update.kernels.programs", "update.kernels.table",
                              "update.rules.common"},
    "update.apply": {"errors", "update.kernels.launch", "update.kernels.table", "update.rules", "update.rules.common",
                     "update.segments"},
    "update.rules": {"keys", "update.rules.common"},
    "update.rules.common": set(),
    "update.rules.adamw": {"update.rules.common"},
    "update.rules.sgd": {"update.rules.common"},
    "update.rules.lamb": RULE | {"update.rules.adamw"},
    "update.rules.lars": RULE | {"update.rules.sgd"},
    # beside the path of an update
    "cost": {"errors", "keys", "update.rules"},
    "saved_files": {"errors"},
    "alike": {"errors", "keys"},
    "inspect": {"alike", "errors", "layouts", "layouts.pieces", "saved_files", "schedule", "schedule.checkpoint"},
}  # fmt: skip
"""All that these modules may know of the package."""

PRIVATE_NAMES = (
    "_configure_optimizer", "_take_model_step", "ZERO_SUPPORTED_OPTIMIZERS", "seq_data_parallel_group",
    "seq_parallel_group", "_SEQUENCE_PARALLEL_GROUP",
    "averaged_gradients",
    "round_robin_bit16_groups", "round_robin_bit16_offsets", "real_dp_process_group", "single_partition_of_fp32_groups",
    "bf16_groups", "fp32_groups_flat_partition", "fp32_groups_gradient_flat_partition", "fp16_groups", "fp32_groups",
    "grad_partitions_flat_buffer", "micro_step_id", "_epilogue_ran_this_backward", "_coalesce_grad_reduction",
    "_use_compact_grad_partition_buffer", "all_grad_tensors", "get_flat_partition",
    "_is_muon_group", "_param_dict", "fp32_groups_has_gradients", "inside_no_sync_ctxt",
    "ds_grad_is_ready",
    "fp32_partitioned_groups_flat", "partition_numel", "ds_process_group", "ds_tensor",
    "ds_numel", "ds_shape",
    "accumulated_grads_in_cpu", "norm_for_param_grads", "reset_cpu_buffers", "micro_steps", "_wait_for_offload_copies",
    "_offload_accumulated_param_ids", "_finalize_cpu_offload_gradient_accumulation",
    "_offload_boundary_param_ids", "_finalize_offload_gradient_accumulation", "_update_scale", "swap_optimizer",
    "_swappable_optimizer_subgroup", "_optimizer_states_and_gradient_swap_in", "_release_swap_buffers",
    "optimizer_swapper", "swap_params_info", "swapped_gradients", "unswapped_gradients",
    "create_adam", "adam_update",
    "_get_all_ckpt_names", "load_module_state_dict", "_load_zero_checkpoint", "update_lp_params", "fp32_flat_groups",
    "base_optimizer_state", "frozen_param_fragments", "_restore_from_bit16_weights", "refresh_fp32_params",
    "_get_zero_ckpt_name", "_get_ckpt_name", "_get_optimizer_ckpt_name", "_get_zero_param_shapes", "checkpoint_mp_rank",
)  # fmt: skip

PRIVATE_TO_MEGATRON = (
    "chained_optimizers", "is_stub_optimizer", "main_grad", "model_param_gbuf_map", "_get_model_param_range_map",
    "float16_groups", "fp32_from_float16_groups", "fp32_from_fp32_groups", "model_float16_groups",
    "model_fp32_groups", "shard_fp32_groups", "shard_fp32_from_float16_groups", "grad_scaler", "prepare_grads",
    "step_with_ready_grads", "_GLOBAL_NUM_MICROBATCHES_CALCULATOR", "layer_number",
)  # fmt: skip

PRIVATE_TO_AUTOGRAD = (
    "_current_graph_task_id", "_will_engine_execute_node", "_execution_engine", "BackwardCFunction",
    "_engine_run_backward",
)  # fmt: skip

WAITING_METHODS = {"item", "tolist", "cpu", "numpy", "nonzero"}
WAITING_CONVERSIONS = {"float", "bool", "int"}

UPDATE_PATH = {
    "controller": set(),
    "meter": {"_warn_of_old_gradients"},
    "growing": {"set_lr"},
    "watching": {"report", "updated", "warn_of_silence", "_write", "state_dict", "load_state_dict"},
    "grad_stats.agreement": set(),
    "grad_stats.backward": set(),
    "grad_stats.hooks": set(),
    "grad_stats.norms": set(),
    "grad_stats.reduce": set(),
    "grad_stats.statistics": {"__init__"},
    "layouts.plain": set(),
    "optimizer": {"_watched", "_is_asked_for_state_alone"},
    "schedule.algorithm": set(),
    "schedule.authors_code": set(),
    "schedule.clock": set(),
    "schedule.schedule": set(),
    "schedule.noise": {"to_dict", "load"},
    "recorded": set(),
    "update.apply": set(),
    "update.kernels.launch": set(),
    "update.kernels.programs": set(),
    "update.kernels.table": set(),
    "update.rules.adamw": set(),
    "update.rules.common": set(),
    "update.rules.lamb": set(),
    "update.rules.lars": set(),
    "update.rules.sgd": set(),
    "update.segments": set(),
    "update.trust_ratio": {"__init__"},
    **{f"{INTERNALS}.{name}": {"__init__"} for name in ("zero0", "zero12", "zero3", "bf16")},
    **{f"{INTERNALS}.{name}_offload": set() for name in ("zero12", "zero3")},
    f"{INTERNALS}.loss_scale": set(),
    f"{INTERNALS}.cpu_adam": set(),
    f"{INTERNALS}.zero12_muon": set(),
}
"""Modules that every update passes through, and their functions that it does not."""

HARMLESS = {
    "grad_stats.agreement: bool(square_of_mean > ROUNDING * mean_square)": "once a run",
    "grad_stats.reduce: both.tolist()": "once a run",
    **{f"{INTERNALS}.{name}: int(self._zero.reduce_bucket_size)": "a Python number" for name in ("zero12", "zero3")},
    "update.kernels.table: int(counts.sum())": "on the CPU, and once for each table",
    **{f"update.rules.{name}: bool(group['momentum'])": "a Python number" for name in ("sgd", "lars")},
    f"{INTERNALS}.cpu_adam: float(step)": "where the pieces are on the CPU already",
    f"{INTERNALS}.cpu_adam: float(lr)": "a Python number",
    "schedule.clock: float(plan.planned_n or 0)": "a Python number",
    "update.apply: vector.tolist()": "where the pieces are on the CPU already",
    **{f"{INTERNALS}.{name}: float(self._zero.loss_scale)": "a Python number" for name in ("zero12", "zero3")},
    "schedule.schedule: int((self.state.warmup >= 1).sum())": "once a run",
    "schedule.schedule: int(self.state.capped.sum())": "once a run",
}


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}


def own_imports(name):
    """Modules of this package that a module imports, wherever in its code."""
    found = set()
    is_package = name == "__init__" or (PACKAGE / name.replace(".", "/")).is_dir()
    here = [] if name == "__init__" else name.split(".")
    for node in ast.walk(TREES[name]):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        base = here[: len(here) - node.level + is_package] + (node.module.split(".") if node.module else [])
        for alias in node.names:
            inner = ".".join([*base, alias.name])
            found.add(inner if inner in SOURCES else ".".join(base))
    return found


def foreign_imports(name):
    """Modules of other packages that a module imports, with their full names."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def uses(name, dotted):
    """Whether a module imports `dotted` or spells it as an attribute."""
    spelled = {ast.unparse(node) for node in ast.walk(TREES[name]) if isinstance(node, ast.Attribute)}
    return any(f"{found}.".startswith(f"{dotted}.") for found in foreign_imports(name) | spelled)


# -- imports ----------------------------------------------------------------------------------------------------------


def test_every_module_has_its_floor():
    assert set(FLOOR_OF) == set(SOURCES)


@pytest.mark.parametrize("name", SOURCES)
def test_imports_go_down(name):
    upwards = {other for other in own_imports(name) if FLOOR_OF[other] >= FLOOR_OF[name]}
    assert upwards == set()


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_a_module_that_stands_alone_knows_nothing_else_of_the_package(name):
    assert own_imports(name) <= MAY_IMPORT[name]


@pytest.mark.parametrize("name", [name for name in SOURCES if name.split(".")[0] != "cost"])
def test_training_does_not_use_the_cost_model(name):
    assert not any(other.split(".")[0] == "cost" for other in own_imports(name))


@pytest.mark.parametrize("name", SOURCES)
def test_the_package_imports_itself_by_relative_names(name):
    assert not any(found.split(".")[0] == "ds_lena" for found in foreign_imports(name))


def test_the_walk_finds_what_is_there():
    assert own_imports("controller") >= {"binding", "config", "meter", "schedule.schedule", "update.apply"}
    assert own_imports("integrations.deepspeed.attach") >= {
        "optimizer",
        "integrations.deepspeed.bind",
        f"{INTERNALS}.seam",
    }
    assert own_imports("update.rules.lamb") >= {"update.rules.adamw", "update.rules.common"}
    assert "integrations.deepspeed.attach" in own_imports("_registration")
    assert uses("grad_stats.reduce", "torch.distributed") and uses(f"{INTERNALS}.zero0", "torch.distributed")


def names_in(tree):
    """Attributes and texts of a module's code. Documentation may name what it speaks of."""
    nodes = list(ast.walk(tree))
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return attributes | {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


# -- who may talk to what ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
def test_only_reduce_and_the_integrations_talk_to_torch_distributed(name):
    assert not uses(name, "torch.distributed") or name == "grad_stats.reduce" or name.startswith("integrations.")


@pytest.mark.parametrize("library", ["deepspeed", "transformers", "accelerate"])
@pytest.mark.parametrize("name", SOURCES)
def test_only_the_integrations_import_other_libraries(name, library):
    imported = {found.split(".")[0] for found in foreign_imports(name)}
    assert library not in imported or name.startswith("integrations.")


@pytest.mark.parametrize("name", SOURCES)
def test_only_the_kernels_import_triton(name):
    imported = {found.split(".")[0] for found in foreign_imports(name)}
    assert "triton" not in imported or name == "update.kernels.programs"


@pytest.mark.parametrize("private", PRIVATE_NAMES)
def test_private_names_of_deepspeed_stand_in_their_folder(private):
    spelled_in = {name for name, source in SOURCES.items() if re.search(rf"\b{private}\b", source)}
    assert spelled_in and all(name.startswith(f"{INTERNALS}.") for name in spelled_in)


@pytest.mark.parametrize("private", PRIVATE_TO_MEGATRON)
def test_private_names_of_megatron_stand_in_one_file(private):
    spelled_in = {name for name, tree in TREES.items() if private in names_in(tree)}
    assert spelled_in == {"integrations.megatron._internals"}


@pytest.mark.parametrize("private", PRIVATE_TO_AUTOGRAD)
def test_private_names_of_autograd_stand_in_one_file(private):
    spelled_in = {name for name, source in SOURCES.items() if re.search(rf"\b{private}\b", source)}
    assert spelled_in == {"grad_stats.backward"}


@pytest.mark.parametrize("name", [n for n in SOURCES if n.startswith("integrations") and "_internals" not in n])
def test_the_integrations_touch_no_private_attribute_of_others(name):
    foreign = [
        ast.unparse(node)
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr) and ast.unparse(node.value) != "self"
    ]
    assert foreign == []


def waits(node):
    """Whether a call may wait for a number from the device: a method of a tensor, or a conversion."""
    if not isinstance(node, ast.Call):
        return False
    return getattr(node.func, "attr", None) in WAITING_METHODS or getattr(node.func, "id", None) in WAITING_CONVERSIONS


def functions_of(name):
    return [node for node in ast.walk(TREES[name]) if isinstance(node, ast.FunctionDef)]


def waiting_calls(name, left_out):
    functions = [function for function in functions_of(name) if function.name not in left_out]
    nodes = [node for function in functions for node in ast.walk(function)]
    return {f"{name}: {ast.unparse(node)}" for node in nodes if waits(node)}


def test_an_update_does_not_wait_for_the_device():
    found = {call for name, left_out in UPDATE_PATH.items() for call in waiting_calls(name, left_out)}
    assert found == set(HARMLESS)


@pytest.mark.parametrize("name", UPDATE_PATH)
def test_the_functions_that_an_update_does_not_pass_through_are_there(name):
    assert UPDATE_PATH[name] <= {function.name for function in functions_of(name)}


@pytest.mark.parametrize("name", SOURCES)
def test_a_library_does_not_print(name):
    calls = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.Call)]
    assert "print" not in [getattr(call.func, "id", None) for call in calls]


# -- what a user sees -------------------------------------------------------------------------------------------------


def test_the_public_names():
    names = {"LENA", "ConfigError", "LenaError", "StateError", "UnsupportedError", "__version__", "report", "watch"}
    names |= {"BatchGrowth", "SampleSchedule", "cosine", "grow", "linear", "warmup_stable_decay"}
    assert set(ds_lena.__all__) == names
    assert all(hasattr(ds_lena, name) for name in ds_lena.__all__)


def in_a_fresh_interpreter(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_it_registers_the_optimizer_and_imports_neither_deepspeed_nor_transformers():
    imported = in_a_fresh_interpreter(
        "import sys, torch, ds_lena\n"
        "assert torch.optim.LENA is ds_lena.LENA\n"
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    assert "ds_lena" in imported
    assert {"deepspeed", "transformers", "accelerate"}.isdisjoint(imported)
