"""Runs of the examples, one after the other in this one process: `examples_in_turn.py CASES ANSWERS`, files of JSON.

CASES is a list of [script, arguments]; ANSWERS gets the exit code of each, and what was said.
"""

import contextlib
import io
import json
import runpy
import sys
import traceback
from pathlib import Path

from benchmarks.command import leave

EXAMPLES = Path(__file__).parents[3] / "examples"


def run(script, arguments):
    sys.argv = [script, *arguments]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    except SystemExit as end:
        return {"code": end.code if isinstance(end.code, int) else 1, "said": str(end.code)}
    except BaseException:
        return {"code": None, "said": traceback.format_exc()}
    return {"code": 0, "said": said.getvalue()}


if __name__ == "__main__":
    cases, answers = (Path(argument) for argument in sys.argv[1:])
    sys.path.insert(0, str(EXAMPLES))  # as Python does for a script
    answers.write_text(json.dumps([run(*case) for case in json.loads(cases.read_text())]))
    leave()
