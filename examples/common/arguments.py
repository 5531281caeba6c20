"""The command line: what is asked for, read once and checked before anything is made."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from transformers import HfArgumentParser, TrainingArguments

from . import presets
from .checks import refuse_contradictions
from .corpus import DataArguments
from .deepspeed_config import read_config, refuse_without_launcher
from .errors import InputError, give_up
from .ignored import refuse_ignored
from .ranges import refuse_out_of_range


@dataclass
class RunArguments:
    """How to compare, and when to stop."""

    optimizer_preset: str | None = field(
        default=None, metadata={"choices": list(presets.PRESETS), "help": presets.HELP}
    )
    target_loss: float | None = field(
        default=None, metadata={"help": "Stop after the first evaluation whose held-out loss is not above this."}
    )


class Parser(HfArgumentParser):
    """HF's, with one line on one rank for an error, instead of some hundred lines of usage on each."""

    def error(self, message: str) -> NoReturn:
        give_up(self.prog, message)


def parse(
    model_arguments: type, defaults: Mapping[str, Any], no_decay: Sequence[str], description: str | None
) -> tuple[Parser, tuple[Any, DataArguments, RunArguments, TrainingArguments]]:
    """Read the command line.

    Args:
        model_arguments: a dataclass of options.
        defaults: those that differ from the dataclasses'.
        no_decay: patterns of the names that a preset of LENA does not decay.
    """
    parser = Parser((model_arguments, DataArguments, RunArguments, TrainingArguments), description=description)
    parser.set_defaults(**defaults)
    options = parser.parse_args()
    try:
        # A default is the very object that was set, so that what was typed can be told from it.
        typed = {name for name, value in vars(options).items() if value is not parser.get_default(name)}
        refuse_out_of_range(options)
        options.deepspeed = read_config(options.deepspeed)
        if options.deepspeed is not None:
            refuse_without_launcher()
        if options.optimizer_preset:
            _swap(options, typed, list(no_decay))
        try:
            parsed = parser.parse_dict(vars(options))
        except ValueError as error:  # TrainingArguments' own checks
            raise InputError(" ".join(str(error).split())) from error
        refuse_contradictions(parsed[-1], typed)
        refuse_ignored(parsed[1], typed)
        _refuse_endless(*parsed[1:])
    except InputError as error:
        parser.error(str(error))
    return parser, parsed


def _swap(options: argparse.Namespace, typed: set[str], no_decay: list[str]) -> None:
    if options.deepspeed is None:
        raise InputError(
            f"--optimizer-preset {options.optimizer_preset} is for DeepSpeed: give --deepspeed FILE, or launch with "
            "an accelerate config that has deepspeed_config_file"
        )
    for name, value in presets.defaults(options.optimizer_preset).items():
        if name not in typed:
            setattr(options, name, value)
    replaced = options.deepspeed.get("optimizer", {})
    options.deepspeed["optimizer"] = presets.entry(options.optimizer_preset, replaced, no_decay)


def _refuse_endless(data: DataArguments, run: RunArguments, training: TrainingArguments) -> None:
    if data.streaming and training.max_steps <= 0:
        raise InputError("--streaming needs --max_steps: the length of a stream is not known")
    if run.target_loss is not None and training.eval_strategy == "no":
        raise InputError("--target-loss needs evaluations: give --eval_strategy steps and --eval_steps")
