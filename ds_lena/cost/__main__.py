"""`python -m ds_lena.cost --params 70e9 --ranks 1024 --stage 3`: what LENA adds to a training step, as a table."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, NoReturn

from ..errors import ConfigError
from ..keys import BASES
from .job import PRECISIONS, STAGES, Job
from .machines import CONSTANTS, MACHINES, WHOLE_CONSTANTS
from .model import estimate
from .report import as_dict, as_markdown, as_text

PROGRAM = "python -m ds_lena.cost"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as all errors of ds_lena."""
        self.exit(2, f"LENA: {message}. See {PROGRAM} --help.\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the cost of every job that is asked for. 2 where one of them cannot exist."""
    given = {key: value for key, value in vars(_parser().parse_args(arguments)).items() if value is not None}
    entries = {key: given[key] for key in given if key in {field.name for field in fields(Job)}}
    constants = {key: given[key] for key in CONSTANTS if key in given}
    try:
        machine = replace(MACHINES[given["machine"]], **constants)
        jobs = [Job(**entries | {"params": p, "ranks": r}) for p in given["params"] for r in given["ranks"]]
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    costs = [(job, estimate(job, machine)) for job in jobs]
    name = ", ".join([given["machine"], *(f"{key}={value:g}" for key, value in constants.items())])
    if given["json"]:
        found = [as_dict(job, machine, cost) for job, cost in costs]
        text = json.dumps(found[0] if len(found) == 1 else found, indent=1)
    else:
        text = as_text(*costs[0], name, machine) if len(costs) == 1 else as_markdown(costs)
    sys.stdout.write(text + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, description=__doc__, allow_abbrev=False)
    add: Any = parser.add_argument
    add("--params", type=_number, nargs="+", required=True, help="of the model, 70e9 for example; several for a table")
    add("--ranks", type=_whole, nargs="+", required=True, help="of all kinds of parallelism; several for a table")
    add("--stage", type=_whole, help=f"ZeRO stage, {_words(STAGES)}; default: {Job.stage}")
    add("--tensor-parallel", type=_whole, help="ranks that share each tensor; default: 1")
    add("--pipeline-parallel", type=_whole, help="pipeline stages; default: 1")
    add("--tokens", type=_number, help=f"per micro-batch and replica; default: {Job.tokens}")
    add("--accumulation", type=_whole, help="micro-batches per update and replica; default: 1")
    add("--base", help=f"{_words(tuple(BASES))}; default: {Job.base}")
    add("--precision", help=f"of weights and gradients, {_words(tuple(PRECISIONS))}; default: {Job.precision}")
    add("--tensors", type=_whole, help="parameter tensors; default: those of a GPT of this size")
    add("--layers", type=_whole, help="gains; default: one for each tensor")
    add("--machine", choices=MACHINES, default="h100", help="the constants; default: h100, which we have not measured")
    add("--json", action="store_true", help="everything, in bytes and seconds")
    constants = parser.add_argument_group("constants of the machine, in seconds, bytes per second and FLOP per second")
    for name in CONSTANTS:
        constants.add_argument(f"--{name.replace('_', '-')}", type=_whole if name in WHOLE_CONSTANTS else _number)
    return parser


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed is a number, such as 70e9") from None


def _whole(text: str) -> int:
    value = _number(text)
    if value != value // 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed is a whole number")
    return int(value)


def _words(values: Sequence[object]) -> str:
    return ", ".join(str(value) for value in values)


if __name__ == "__main__":
    sys.exit(main())
