"""The DeepSpeed config: where it comes from, and whether its sections look like sections."""

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import InputError

_SECTIONS = ("optimizer", "scheduler", "zero_optimization", "bf16", "fp16")
_WITH_TYPE = ("optimizer", "scheduler")
_STAGES = (0, 1, 2, 3)
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_CLOUDS = ("AZUREML_EXPERIMENT_ID", "SM_TRAINING_ENV")  # where DeepSpeed finds the ranks by itself


def read_config(source: str | None) -> dict[str, Any] | None:
    """The DeepSpeed config as a dict: from a file, JSON text, or the file that accelerate's config names.

    Raises:
        InputError: it cannot be read, or HF and DeepSpeed would stumble over the form of what is there.
    """
    source = source or os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if source is None:
        return None
    is_text = source.lstrip().startswith("{")
    try:
        config = json.loads(source if is_text else Path(source).expanduser().read_text())
    except OSError as error:
        raise InputError(f"DeepSpeed config {source}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"DeepSpeed config {source}: not JSON: {error}") from error
    if (wrong := _what_is_wrong(config)) is not None:
        raise InputError(f"DeepSpeed config {source}: {wrong}")
    return dict(config)


def refuse_without_launcher() -> None:
    """Raise InputError where DeepSpeed could not tell which rank this is, nor ask MPI, for which it needs mpi4py."""
    missing = [name for name in _LAUNCHED if name not in os.environ]
    if missing and find_spec("mpi4py") is None and not any(name in os.environ for name in _CLOUDS):
        raise InputError(
            f"DeepSpeed trains in processes that a launcher has started; this one lacks {', '.join(missing)}. "
            "Write `deepspeed --num_gpus N`, `accelerate launch` or `torchrun` before the script, instead of `python`"
        )


def _what_is_wrong(config: Any) -> str | None:
    if not isinstance(config, dict):
        return f"a JSON object is needed, this is a {type(config).__name__}"
    for name in _SECTIONS:
        section = config.get(name, {})
        if not isinstance(section, dict):
            return f'"{name}" is {json.dumps(section)}; it must be a JSON object, {{…}}'
        if not isinstance(section.get("params") or {}, dict):
            return f'"params" of "{name}" is {json.dumps(section["params"])}; it must be a JSON object, {{…}}'
        if name in config and name in _WITH_TYPE and not isinstance(section.get("type"), str):
            return f'"{name}" needs a "type" that is a name, such as {{"type": "…", "params": {{…}}}}'
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in _STAGES:
        return f'"stage" of "zero_optimization" is {json.dumps(stage)}; it must be 0, 1, 2 or 3'
    return None
