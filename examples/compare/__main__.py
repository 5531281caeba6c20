"""`python -m examples.compare run [STUDY …]` and `python -m examples.compare report`; see the package."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from filelock import FileLock, Timeout

from ..common.errors import InputError
from ..common.history import write_whole
from .jobs import refuse_outdated
from .plan import STUDIES, Study, read
from .records import RESULTS, Records


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.compare", description=__doc__)
    parser.add_argument("--studies", type=Path, default=STUDIES, help="the YAML that says what is compared")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="go on with the studies; interrupt it whenever you like")
    running.add_argument("study", nargs="*", help="studies to run, with what they depend on; all if none is named")
    running.add_argument("--workers", type=_at_least_one, help="runs at a time, one core each; default: all cores")
    commands.add_parser("report", help="write tables.md and pictures from the records")
    args = parser.parse_args()
    try:
        studies = read(args.studies)
        records = Records(args.results, studies)
        refuse_outdated(studies, records)
        {"run": _run, "report": _report}[args.command](args, studies, records)
    except InputError as error:
        sys.exit(f"{parser.prog}: error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from the runs that have ended")


def _run(args: argparse.Namespace, studies: Mapping[str, Study], records: Records) -> None:
    if unknown := set(args.study) - studies.keys():
        raise InputError(f"no study is called {', '.join(sorted(unknown))}; there are {', '.join(studies)}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded
    from .queue import run

    args.results.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(args.results / ".lock", timeout=0):
            run(studies, records, set(args.study or studies), args.workers)
    except BrokenProcessPool as error:
        raise InputError("a run was killed, for want of memory perhaps; the same command goes on") from error
    except Timeout as error:
        raise InputError(f"another process is running studies into {args.results}") from error


def _at_least_one(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is given, at least 1 is needed")
    return number


def _report(args: argparse.Namespace, studies: Mapping[str, Study], records: Records) -> None:
    from .pictures import draw
    from .tables import tables

    args.results.mkdir(parents=True, exist_ok=True)
    write_whole(args.results / "tables.md", tables(studies, records))
    draw(studies, records, args.results)


if __name__ == "__main__":
    main()
