"""`python -m examples.compare run [STUDY …]` and `python -m examples.compare report`; see the package."""

import argparse
import os
import sys
from pathlib import Path

from ..common.errors import InputError
from ..common.history import write_whole
from .plan import STUDIES, read
from .records import RESULTS, Records
from .tables import tables


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.compare", description=__doc__)
    parser.add_argument("--studies", type=Path, default=STUDIES, help="the YAML that says what is compared")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="go on with the studies; interrupt it whenever you like")
    running.add_argument("study", nargs="*", help="studies to run, with what they depend on; all if none is named")
    running.add_argument("--workers", type=int, help="runs at a time, one core each")
    commands.add_parser("report", help="write tables.md and pictures from the records")
    args = parser.parse_args()
    try:
        studies = read(args.studies)
        records = Records(args.results, studies)
        if args.command == "report":
            write_whole(args.results / "tables.md", tables(studies, records))
            from .pictures import draw  # matplotlib

            draw(studies, records, args.results)
            return
        if unknown := set(args.study) - studies.keys():
            raise InputError(f"no study is called {', '.join(sorted(unknown))}; there are {', '.join(studies)}")
    except InputError as error:
        sys.exit(f"{parser.prog}: error: {error}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from . import queue  # after the arguments, since it loads torch

    try:
        queue.run(studies, records, set(args.study or studies), args.workers)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from the runs that have ended")


if __name__ == "__main__":
    main()
