"""The command line: what is asked for, read once and checked before anything is made."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from transformers import HfArgumentParser, TrainingArguments

from . import presets
from .corpus import DataArguments
from .deepspeed_config import read_config, refuse_ignored
from .errors import InputError, give_up, in_one_line
from .options import option


@dataclass
class RunArguments:
    """How to compare, and when to stop."""

    optimizer_preset: str | None = option(None, presets.HELP, choices=list(presets.PRESETS))
    target_loss: float | None = option(None, "Stop after the first evaluation whose held-out loss is not above this.")


class Parser(HfArgumentParser):
    """HF's, with one line on one rank for an error, instead of some hundred lines of usage on each."""

    def error(self, message: str) -> NoReturn:
        give_up(self.prog, message)


def parse(
    model_arguments: type, defaults: Mapping[str, Any], no_decay: list[str], description: str | None
) -> tuple[Parser, tuple[Any, DataArguments, RunArguments, TrainingArguments]]:
    """Read the command line. ``no_decay``: patterns of the names that a preset of LENA does not decay."""
    parser = Parser((model_arguments, DataArguments, RunArguments, TrainingArguments), description=description)
    parser.set_defaults(**defaults)
    options = parser.parse_args()
    try:
        # A default is the very object that was set, so that what was typed can be told from it.
        typed = {name for name, value in vars(options).items() if value is not parser.get_default(name)}
        options.deepspeed = read_config(options.deepspeed)
        if options.optimizer_preset:
            if options.deepspeed is None:
                raise InputError("--optimizer-preset is for DeepSpeed: give --deepspeed FILE, or use accelerate launch")
            new = presets.defaults(options.optimizer_preset)
            vars(options).update({name: value for name, value in new.items() if name not in typed})
            replaced = options.deepspeed.get("optimizer", {})
            options.deepspeed["optimizer"] = presets.entry(options.optimizer_preset, replaced, no_decay)
        if options.deepspeed is not None:
            refuse_ignored(options, typed)
        with in_one_line("arguments"):
            parsed = parser.parse_dict(vars(options))
        if parsed[1].streaming:
            _refuse_sharing_out(parsed[-1])
    except InputError as error:
        parser.error(str(error))
    return parser, parsed


def _refuse_sharing_out(args: TrainingArguments) -> None:
    """Several readers would share out the files, and each skip its own first texts instead of the held-out ones."""
    if args.dataloader_num_workers > 1 or args.accelerator_config.dispatch_batches is False:
        raise InputError(
            "--streaming has one reader, which sends every rank its blocks: leave --dataloader_num_workers at 0 or 1, "
            'and "dispatch_batches" out of --accelerator_config'
        )
