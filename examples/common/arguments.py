"""The command line: what is asked for, read once and checked before anything is made."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from transformers import HfArgumentParser, TrainingArguments

from . import presets
from .corpus import DataArguments
from .deepspeed_config import read_config, refuse_ignored
from .errors import InputError, give_up, in_one_line


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
        options.deepspeed = read_config(options.deepspeed)
        if options.optimizer_preset:
            _swap(options, typed, list(no_decay))
        if options.deepspeed is not None:
            refuse_ignored(options, typed)
        with in_one_line("arguments"):
            parsed = parser.parse_dict(vars(options))
        if parsed[1].streaming:
            _refuse_sharing_out(parsed[-1])
    except InputError as error:
        parser.error(str(error))
    return parser, parsed


def _swap(options: argparse.Namespace, typed: set[str], no_decay: list[str]) -> None:
    preset = options.optimizer_preset
    if options.deepspeed is None:
        raise InputError(
            f"--optimizer-preset {preset} is for DeepSpeed: give --deepspeed FILE, or launch with an accelerate config "
            "that has deepspeed_config_file"
        )
    for name, value in presets.defaults(preset).items():
        if name not in typed:
            setattr(options, name, value)
    options.deepspeed["optimizer"] = presets.entry(preset, options.deepspeed.get("optimizer", {}), no_decay)


def _refuse_sharing_out(args: TrainingArguments) -> None:
    """Several readers would share out the files, and each skip its own first texts instead of the held-out ones."""
    if args.dataloader_num_workers > 1 or args.accelerator_config.dispatch_batches is False:
        raise InputError(
            "--streaming has one reader, who sends every rank its blocks: leave --dataloader_num_workers at 0 or 1, "
            'and "dispatch_batches" out of --accelerator_config'
        )
