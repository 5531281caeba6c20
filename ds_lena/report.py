"""The command `python -m ds_lena.report LOG`: one page of HTML from a run's log. To Python it is a function."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import page
from .errors import LenaError

if __name__ != "__main__":
    raise ImportError("ds_lena.report is a function: ds_lena.report(engine). As a command: python -m ds_lena.report")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ds_lena.report", description=__doc__)
    parser.add_argument("log", type=Path, help="JSON lines of ds_lena.watch(…, log=FILE), or an example's history")
    parser.add_argument("-o", "--out", type=Path, help="the page; LOG with the ending .html if it is left out")
    given = parser.parse_args()
    out = given.out or given.log.with_suffix(".html")
    try:
        made = page.make(page.read(given.log), f"Noise scale: {given.log.name}")
    except LenaError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    out.write_text(made)
    sys.stdout.write(f"{out}\n")
    return 0


sys.exit(main())
