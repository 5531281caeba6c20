"""All benchmarks, one after the other, each in a process of its own.

    python -m benchmarks                             everything, into outputs/benchmarks
    python -m benchmarks optimizers hooks            these (or --only optimizers,hooks)
    python -m benchmarks --quick --out /tmp/quick    tiny sizes: whether it runs, not how fast

Writes one JSON file for each benchmark, and the tables of all such files there into tables.md. README.md in this folder
says what is measured.
`python -m benchmarks.NAME --help` lists the options of one (of engines: benchmarks.step_time).
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.command import markdown

MODULES = {
    "optimizers": "benchmarks.optimizers",
    "engines": "benchmarks.step_time",
    "hooks": "benchmarks.hooks",
    "tensors": "benchmarks.tensors",
    "memory": "benchmarks.memory",
    "traffic": "benchmarks.traffic",
    "designs": "benchmarks.designs",
    "example": "benchmarks.example",
}
FULL = {"engines": ["--tokens", "512", "1024"]}
"""What a command line says beside --out, unless it says --quick."""


def main() -> int:
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in args.names:
        begin = time.monotonic()
        print(f"# {name}", file=sys.stderr)
        if not _run(name, _file(args.out, name), args.quick):
            failed.append(name)
        print(f"# {name}: {time.monotonic() - begin:.0f} s", file=sys.stderr)
    tables = _tables(args.out, failed)
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


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def _run(name: str, out: Path, quick: bool) -> bool:
    """Whether it ended well. An older file is removed."""
    out.unlink(missing_ok=True)
    options = ["--quick"] if quick else FULL.get(name, [])
    command = [sys.executable, "-m", MODULES[name], *options, "--out", str(out)]
    return subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode == 0


def _tables(folder: Path, failed: list[str]) -> str:
    """Of all results in the folder, those of earlier runs too: each stands under its own circumstances."""
    parts = []
    for name, module in MODULES.items():
        if name not in failed and _file(folder, name).exists():
            results = json.loads(_file(folder, name).read_text())
            parts.append(f"## {name}\n\n{markdown(results, importlib.import_module(module).as_tables)}")
    parts += [f"## {name}\n\nFailed; see its messages." for name in failed]
    return "\n\n".join(["# Benchmarks", *parts]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
