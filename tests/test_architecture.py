"""The plan of the house, checked on the source: who may import whom, who may talk to what, and what a user sees."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ds_lena
from ds_lena.config import BASES

PACKAGE = Path(ds_lena.__file__).parent

FLOORS = (
    {"errors", "version"},
    {"config", "norms", "layers", "reduce", "rules.common"},
    {"algorithm", "parameters", "probe", "rules.adamw", "rules.sgd"},
    {"authors_code", "shards"},
    {"tracker", "plain", "measure", "rules"},
    {"stepper", "cost"},
    {"trust"},
    {"optimizer"},
    {"monitor", "integrations", "integrations._deepspeed_private", "integrations.transformers"},
    {"integrations.deepspeed", "integrations.callback"},
    {"_registration"},
    {"__init__"},
    {"run"},
)
"""From the ground up: a module imports from lower floors only, so there is no cycle."""

FLOOR_OF = {module: height for height, floor in enumerate(FLOORS) for module in floor}
# A new rule may build on the two that are listed.
FLOOR_OF = {f"rules.{name}": FLOOR_OF["shards"] for name in BASES} | FLOOR_OF

INDEPENDENT = {
    "errors": set(),
    "norms": {"errors"},
    "layers": set(),
    "reduce": set(),
    "algorithm": {"config"},
    "rules": {"config", "rules.common"},
    "rules.adamw": {"rules.common"},
    "rules.sgd": {"rules.common"},
    "rules.lamb": {"norms", "rules", "rules.adamw", "rules.common"},
    "rules.lars": {"norms", "rules", "rules.sgd", "rules.common"},
    "rules.common": set(),
    "cost": {"config", "errors", "rules"},
}
"""All that these modules may know of the package."""

SEAM = "integrations._deepspeed_private"

PRIVATE_NAMES = (
    "_configure_optimizer", "_take_model_step", "ZERO_SUPPORTED_OPTIMIZERS", "seq_data_parallel_group",
    "averaged_gradients",
    "round_robin_bit16_groups", "round_robin_bit16_offsets", "real_dp_process_group", "single_partition_of_fp32_groups",
    "bf16_groups", "fp32_groups_flat_partition", "fp32_groups_gradient_flat_partition", "fp16_groups", "fp32_groups",
    "grad_partitions_flat_buffer", "fp32_partitioned_groups_flat", "partition_numel", "ds_process_group", "ds_tensor",
    "ds_numel", "ds_shape",
)  # fmt: skip

WAITING_METHODS = {"item", "tolist", "cpu", "numpy", "nonzero"}
WAITING_CONVERSIONS = {"float", "bool", "int"}

UPDATE_PATH = {
    "algorithm": set(),
    "authors_code": set(),
    "measure": set(),
    "norms": set(),
    "optimizer": {"__init__"},
    "plain": set(),
    "probe": set(),
    "reduce": set(),
    "rules.adamw": set(),
    "rules.common": set(),
    "rules.lamb": set(),
    "rules.lars": set(),
    "rules.sgd": set(),
    "shards": set(),
    "stepper": set(),
    "trust": {"__init__"},
    "tracker": {"report", "state_dict", "load_state_dict", "_load_layers", "_noise_scale"},
}
"""Modules that every update passes through, and their functions that it does not."""

HARMLESS = {
    "measure: float(self._probe.passes)": "a Python number",
    "tracker: float(plan.planned_n)": "a Python number",
    "stepper: rates.tolist()": "where the rates are on the CPU already",
    "tracker: int((self.state.warmup >= 1).sum())": "once a run",
    "tracker: int(self.state.capped.sum())": "once a run",
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


@pytest.mark.parametrize("name", INDEPENDENT)
def test_a_module_that_stands_alone_knows_nothing_else_of_the_package(name):
    assert own_imports(name) <= INDEPENDENT[name]


@pytest.mark.parametrize("name", SOURCES)
def test_training_does_not_use_the_cost_model(name):
    assert "cost" not in own_imports(name)


@pytest.mark.parametrize("name", SOURCES)
def test_the_package_imports_itself_by_relative_names(name):
    assert not any(found.split(".")[0] == "ds_lena" for found in foreign_imports(name))


def test_the_walk_finds_what_is_there():
    assert own_imports("optimizer") >= {"measure", "config", "shards", "probe", "tracker", "rules"}
    assert own_imports("integrations.deepspeed") >= {"optimizer", SEAM, "integrations.transformers"}
    assert own_imports("rules.lamb") >= {"rules.adamw", "rules.common"}
    assert "integrations.deepspeed" in own_imports("_registration")
    assert uses("reduce", "torch.distributed") and uses(SEAM, "torch.distributed")


# -- who may talk to what ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
def test_only_reduce_and_the_integrations_talk_to_torch_distributed(name):
    assert not uses(name, "torch.distributed") or name == "reduce" or name.startswith("integrations.")


@pytest.mark.parametrize("library", ["deepspeed", "transformers", "accelerate"])
@pytest.mark.parametrize("name", SOURCES)
def test_only_the_integrations_import_other_libraries(name, library):
    imported = {found.split(".")[0] for found in foreign_imports(name)}
    assert library not in imported or name.startswith("integrations.")


@pytest.mark.parametrize("private", PRIVATE_NAMES)
def test_private_names_of_deepspeed_stand_behind_the_seam(private):
    spelled_in = {name for name, source in SOURCES.items() if re.search(rf"\b{private}\b", source)}
    assert spelled_in == {SEAM}


@pytest.mark.parametrize("name", ["integrations.deepspeed", "integrations.transformers"])
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
    names = {"LENA", "ConfigError", "LenaError", "StateError", "UnsupportedError", "__version__", "report"}
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
