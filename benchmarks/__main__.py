"""All benchmarks, one after the other, each in processes of its own.

    python -m benchmarks                             everything, into outputs/benchmarks
    python -m benchmarks optimizers hooks            these
    python -m benchmarks --quick --out /tmp/quick    tiny sizes: whether it runs, not how fast

Writes NAME.json, all measurements, and NAME.md, the tables, for each. README.md in this folder says what is measured.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

COMMANDS = {  # module, and options unless --quick
    "optimizers": ("optimizers", "--seconds 40"),
    "engines": ("engines", "--tokens 512 1024"),
    "hooks": ("engines", "--ranks 1 --stages 0 --accumulation 1 --tokens 128 512 1024"),
    "tensors": ("optimizers", "--counts 100 300 1000 3000 10000 --seconds 20"),
    "offload": ("offload", ""),
    "sequence": ("sequence", ""),
    "footprint": ("footprint", ""),
    "example": ("example", ""),
}
QUICK = {"hooks": "--ranks 1 --stages 0", "tensors": "--counts 10 100"}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(COMMANDS)}")
    add("--quick", action="store_true", help="tiny sizes: whether it runs, not how fast")
    add("--out", type=Path, default=Path("outputs/benchmarks"), help="default: outputs/benchmarks")
    args = parser.parse_args()
    names = args.names or list(COMMANDS)
    if unknown := set(names) - COMMANDS.keys():
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(COMMANDS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in names:
        module, options = COMMANDS[name]
        words = ["--quick", *QUICK.get(name, "").split()] if args.quick else options.split()
        data, tables = (args.out / f"{name}.{kind}" for kind in ("json", "md"))
        data.unlink(missing_ok=True), tables.unlink(missing_ok=True)  # of an earlier run
        words += ["--out", str(data)]
        print(f"# {name}", file=sys.stderr)
        command = [sys.executable, "-m", f"benchmarks.{module}", *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            failed.append(name)
        else:
            tables.write_text(f"## {name}\n\n{done.stdout}")
            print(tables.read_text())
    if failed:
        print(f"failed, see their messages: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
