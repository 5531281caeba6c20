"""HF's arguments and the DeepSpeed config must not say different things, nor one of them be ignored without a word."""

import copy
import re
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from ds_lena.config import LenaConfig
from ds_lena.errors import ConfigError

from .errors import InputError

_OPTIMIZER_KEYS = {
    "learning_rate": "lr",
    "weight_decay": "weight_decay",
    "adam_beta1": "betas",
    "adam_beta2": "betas",
    "adam_epsilon": "eps",
}
_CONFIG_KEYS = {"gradient_accumulation_steps": "gradient_accumulation_steps", "max_grad_norm": "gradient_clipping"}
_MISMATCH = re.compile(r"- ds (\S+)=(.*) vs hf (.*)=(.*)")


def refuse_contradictions(args: TrainingArguments, typed: set[str]) -> None:
    """Raise where one of the two would be ignored, or HF would raise later.

    Args:
        args: HF's arguments, which have filled what is "auto" in the config.
        typed: names of the options that were given on the command line.

    Raises:
        InputError: says both values and what to do.
    """
    hf_config = getattr(args, "hf_deepspeed_config", None)
    if hf_config is None:
        return
    hf_config = copy.deepcopy(hf_config)
    if args.max_steps > 0:  # else HF knows the number only when it trains
        hf_config.fill_match("scheduler.params.total_num_steps", args.max_steps, "max_steps")
        warmup = max(1, args.get_warmup_steps(args.max_steps))
        hf_config.fill_match("scheduler.params.warmup_num_steps", warmup, "warmup_steps (1 stands for none)")
    if told := tell_mismatches("\n".join(hf_config.mismatches)):
        raise InputError(told)
    for argument, key in _CONFIG_KEYS.items():
        if argument in typed and isinstance(args.deepspeed, dict) and key not in args.deepspeed:
            raise InputError(
                f'--{argument} {getattr(args, argument)} would be ignored: the DeepSpeed config has no "{key}". '
                f'Write "{key}": "auto" there.'
            )
    optimizer = hf_config.config.get("optimizer")
    if optimizer is not None:
        _refuse_ignored(optimizer, args, typed)
        if optimizer.get("type") == "LENA":
            _check_lena(optimizer.get("params") or {}, args)


def tell_mismatches(text: str) -> str | None:
    """One line for the lines in which HF lists what does not match; None where there are none."""
    found = [
        f"{key} is {value} in the DeepSpeed config, but the arguments have {name} {other}"
        for key, value, name, other in _MISMATCH.findall(text)
    ]
    return f'{"; ".join(found)}. Write "auto" in the config, or give the same value.' if found else None


def _refuse_ignored(optimizer: dict[str, Any], args: TrainingArguments, typed: Iterable[str]) -> None:
    name, params = optimizer.get("type"), optimizer.get("params") or {}
    (standard,) = (field.default for field in fields(TrainingArguments) if field.name == "optim")
    if args.optim != standard:
        raise InputError(
            f"--optim {OptimizerNames(args.optim).value} would be ignored, as the DeepSpeed config names {name}. "
            "Leave --optim out, or take the optimizer out of the config."
        )
    for argument, key in _OPTIMIZER_KEYS.items():
        if argument in typed and key not in params:
            raise InputError(
                f"--{argument} {getattr(args, argument)} would be ignored: the entry of the optimizer {name} has no "
                f'"{key}". Write "{key}": "auto" there if it takes one, or leave --{argument} out.'
            )


def _check_lena(params: dict[str, Any], args: TrainingArguments) -> None:
    try:
        lena = LenaConfig.from_keys(params)
    except ConfigError as error:
        raise InputError(str(error)) from error
    if lena.total_steps and 0 < args.max_steps != lena.total_steps:
        raise InputError(
            f'LENA has "total_steps": {lena.total_steps} in the DeepSpeed config, but --max_steps is {args.max_steps}. '
            "Leave total_steps out, so that HF's number is taken, or give the same number."
        )
    if lena.warmup != "none" and args.warmup_steps > 0:
        raise InputError(
            f'--warmup_steps {args.warmup_steps:g} would warm up a second time: LENA has "warmup": "{lena.warmup}". '
            'Leave --warmup_steps at 0, or write "warmup": "none" in the optimizer\'s entry.'
        )
