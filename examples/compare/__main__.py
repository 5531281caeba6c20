"""`python -m examples.compare run [STUDY …]` and `python -m examples.compare report`; see the package."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from filelock import FileLock, Timeout
from torch.multiprocessing import ProcessExitedException

from ..common.errors import InputError
from .plan import STUDIES, read
from .runs import RESULTS, Runs, stages


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.compare", description=__doc__)
    parser.add_argument("--studies", type=Path, default=STUDIES, help="the Python file that says what is compared")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the runs")
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="go on with the studies; interrupt it whenever you like")
    running.add_argument("study", nargs="*", help="studies to run, with what they depend on; all if none is named")
    running.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time, a core for each")
    commands.add_parser("report", help="write tables.md, front.md and pictures from the runs")
    args = parser.parse_args()
    try:
        {"run": _run, "report": _report}[args.command](args)
    except InputError as error:
        sys.exit(f"{parser.prog}: error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from the runs that have ended")


def _run(args: argparse.Namespace) -> None:
    studies = read(args.studies)
    if unknown := set(args.study) - studies.keys():
        raise InputError(f"no study is called {', '.join(sorted(unknown))}; there are {', '.join(studies)}")
    if args.workers < 1:
        raise InputError(f"--workers is {args.workers}; at least 1 is needed")
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}  # of the workers
    from .workers import run

    args.results.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(args.results / ".lock", timeout=0):
            run(stages(studies[name] for name in args.study or studies), args.results, args.workers)
    except Timeout as error:
        raise InputError(f"another process is running studies into {args.results}") from error
    except ProcessExitedException as error:
        raise InputError(f"a run was killed, for want of memory perhaps; the same command goes on ({error})") from error


def _report(args: argparse.Namespace) -> None:
    from .front import fronts
    from .pictures import draw
    from .tables import tables

    studies, runs = read(args.studies), Runs(args.results)
    for stage in stages(studies.values()):
        runs.check(stage)
    (args.results / "tables.md").write_text(tables(studies.values(), runs))
    (args.results / "front.md").write_text(fronts(studies.values(), runs))
    draw(studies.values(), runs, args.results)


if __name__ == "__main__":
    main()
