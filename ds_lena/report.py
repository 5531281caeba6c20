"""The command `python -m ds_lena.report LOG`: one page of HTML from a run's log. To Python it is a function."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import page
from .errors import ConfigError, LenaError

if __name__ != "__main__":
    raise ImportError("ds_lena.report is a function: ds_lena.report(engine). As a command: python -m ds_lena.report")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ds_lena.report", description=__doc__)
    parser.add_argument("log", type=Path, help="JSON lines of ds_lena.watch(…, log=FILE), or an example's history")
    parser.add_argument("-o", "--out", type=Path, help="the page; LOG with the ending .html if it is left out")
    given = parser.parse_args()
    try:
        records, skipped = page.read(given.log)
        out = given.out or given.log.with_suffix(".html")
        if out.exists() and out.samefile(given.log):
            raise ConfigError(f"ds_lena.report: the page would overwrite the log {given.log}. Give -o another file.")
        made = page.make(records, f"Noise scale: {given.log.name}")
        out.write_text(made, "utf-8", "xmlcharrefreplace")
    except LenaError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except OSError as error:
        sys.stderr.write(
            f"ds_lena.report: {error}. The log has to be a file that can be read, and the page, -o, one that can be "
            "written, in a folder that exists.\n"
        )
        return 1
    if skipped:
        sys.stderr.write(f"ds_lena.report: lines of {given.log} that are no report, and were left out: {skipped}.\n")
    sys.stdout.write(f"{out}\n")
    return 0


sys.exit(main())
