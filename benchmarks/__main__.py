"""All benchmarks, one after the other, each in a process of its own.

    python -m benchmarks                             everything, into outputs/benchmarks
    python -m benchmarks optimizers hooks            these (or --only optimizers,hooks)
    python -m benchmarks --quick --out /tmp/quick    tiny sizes: whether it runs, not how fast

Writes one JSON file for each benchmark, and all tables into tables.md. README.md in this folder says what is measured.
`python -m benchmarks.NAME --help` lists the options of one (of engines: benchmarks.step_time).
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks.command import markdown

MODULES = {
    "optimizers": ("benchmarks.optimizers", []),
    "engines": ("benchmarks.step_time", []),
    "hooks": ("benchmarks.hooks", []),
    "tensors": ("benchmarks.tensors", []),
    "memory": ("benchmarks.memory", []),
    "traffic": ("benchmarks.traffic", []),
}
"""By name: the module and what its command line says beside --out and --quick."""
LENGTHS = ["--tokens", "512", "1024"]


def main() -> int:
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    written: dict[str, Path] = {}
    failed = []
    for name in args.names:
        begin = time.monotonic()
        print(f"# {name}", file=sys.stderr)
        file = args.out / f"{name}.json"
        if _run(name, file, args.quick):
            written[name] = file
        else:
            failed.append(name)
        print(f"# {name}: {time.monotonic() - begin:.0f} s", file=sys.stderr)
    tables = _tables(written, failed)
    (args.out / "tables.md").write_text(tables)
    print(tables)
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(MODULES)}")
    parser.add_argument("--only", default="", help="the same, with commas between the names")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, not how fast")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks"), help="default: outputs/benchmarks")
    args = parser.parse_args()
    args.names += [name for name in args.only.split(",") if name]
    unknown = set(args.names) - MODULES.keys()
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(MODULES)}")
    args.names = args.names or list(MODULES)
    return args


def _run(name: str, out: Path, quick: bool) -> bool:
    """Whether it ended well."""
    module, options = MODULES[name]
    if name == "engines" and not quick:
        options = LENGTHS
    command = [sys.executable, "-m", module, *options, "--out", str(out), *(["--quick"] if quick else [])]
    return subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode == 0


def _tables(written: Mapping[str, Path], failed: list[str]) -> str:
    parts = []
    for name, file in written.items():
        module = importlib.import_module(MODULES[name][0])
        parts.append(f"## {name}\n\n{markdown(json.loads(file.read_text()), module.as_tables)}")
    parts += [f"## {name}\n\nFailed; see its messages." for name in failed]
    return "\n\n".join(["# Benchmarks", *parts]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
