"""The DeepSpeed config: where it comes from, and what it would ignore of the command line without a word."""

import json
import os
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.utils import HfDeepSpeedConfig

from .errors import InputError, in_one_line

_KEYS = {
    "learning_rate": "optimizer.params.lr",
    "weight_decay": "optimizer.params.weight_decay",
    "adam_beta1": "optimizer.params.betas",
    "adam_beta2": "optimizer.params.betas",
    "adam_epsilon": "optimizer.params.eps",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "max_grad_norm": "gradient_clipping",
}
"""Option -> the key that takes it from HF, by "auto". Where both have a number, HF compares them."""


def read_config(source: str | None) -> dict[str, Any] | None:
    """The DeepSpeed config as a dict: from a file, JSON text, or the file that accelerate's config names."""
    source = source or os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if source is None:
        return None
    # Without a launcher DeepSpeed asks MPI which rank this is.
    if not os.environ.keys() & {"RANK", "OMPI_COMM_WORLD_RANK"} and find_spec("mpi4py") is None:
        raise InputError(
            "DeepSpeed trains in processes that a launcher has started: write `deepspeed --num_gpus N`, "
            "`accelerate launch` or `torchrun` before the script, instead of `python`"
        )
    with in_one_line(f"DeepSpeed config {source}"):
        return dict(json.loads(source if source.lstrip().startswith("{") else Path(source).expanduser().read_text()))


def refuse_ignored(options: Namespace, typed: set[str]) -> None:
    """Raise InputError where ``options.deepspeed`` lacks the key for one of the ``typed`` options."""
    value_of = HfDeepSpeedConfig(options.deepspeed).get_value
    optimizer = value_of("optimizer.type")
    for name, key in _KEYS.items():
        if name in typed and (optimizer or "." not in key) and value_of(key) is None:
            raise InputError(
                f'--{name} {getattr(options, name)} would be ignored: the DeepSpeed config has no "{key}". '
                f'Write "auto" there, or leave --{name} out.'
            )
    if optimizer and "optim" in typed:
        raise InputError(f"--optim {options.optim} would be ignored: the DeepSpeed config names {optimizer}")
    if optimizer == "LENA" and options.warmup_steps and value_of("optimizer.params.warmup") != "none":
        raise InputError(
            f"--warmup_steps {options.warmup_steps:g} would warm up a second time, as LENA does it for each layer. "
            'Leave --warmup_steps at 0, or write "warmup": "none" in the optimizer\'s entry.'
        )
