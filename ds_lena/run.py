"""`deepspeed --module ds_lena.run script.py …`: runs an unmodified script with `"type": "LENA"` known."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence

from . import _registration


def main(arguments: Sequence[str]) -> None:
    """Run the first argument that is not an option as `__main__`. It gets all other arguments.

    The launcher puts `--local_rank=N` before the script's name. The script gets it too, as if it were launched itself.
    """
    position = next((i for i, argument in enumerate(arguments) if not argument.startswith("-")), None)
    if position is None:
        sys.exit(
            "ds_lena.run: no script given. Usage: deepspeed --module ds_lena.run script.py [arguments of the script]"
        )
    script = arguments[position]
    if not os.path.isfile(script):
        sys.exit(f"ds_lena.run: no such script: {script!r} (current folder: {os.getcwd()})")
    _registration.register()
    sys.argv = [script, *arguments[:position], *arguments[position + 1 :]]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
