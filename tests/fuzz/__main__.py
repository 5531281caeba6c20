"""Run many draws: `python -m tests.fuzz --draws 500 --seed 0 --out outputs/fuzz.jsonl`.

One line of JSON for each draw goes to the file. A run that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from tests.fuzz.draws import draw
from tests.fuzz.judge import judge
from tests.integrations._ranks import Ranks

PATIENCE = 150.0  # seconds; a machine may be busy


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument(
        "--worlds", type=int, nargs="+", default=[1, 1, 2, 2, 2, 2, 3, 4], help="numbers of ranks to draw from"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/fuzz.jsonl"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    seeds = range(args.seed, args.seed + args.draws)
    run(seeds, args.worlds, args.out)
    return summarize([row for row in read(args.out) if row["seed"] in seeds])


def run(seeds: range, worlds: list[int], out: Path) -> None:
    """Append the verdicts of those seeds that have none yet. All draws of one number of ranks run in the same ranks."""
    done = {row["seed"] for row in read(out)}
    for world in sorted(set(worlds)):
        with tempfile.TemporaryDirectory() as folder, out.open("a") as file:
            ranks = Ranks(Path(folder), world, PATIENCE)
            for seed in seeds:
                drawn = draw(seed, worlds)
                if seed in done or drawn.world != world:
                    continue
                start = time.monotonic()
                verdict = judge(drawn, ranks, Path(folder))
                row = {"seed": seed, "kind": verdict.kind, "text": verdict.text, "draw": repr(drawn)}
                file.write(json.dumps(row | {"seconds": round(time.monotonic() - start, 2)}) + "\n")
                file.flush()
            ranks.stop()


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def summarize(rows: list[dict]) -> int:
    for (kind, text), count in sorted(Counter((row["kind"], _short(row)) for row in rows).items()):
        print(f"{count:5d}  {kind:22}  {text}")
    findings = [row for row in rows if row["kind"] == "finding"]
    for row in findings:
        print(f"\nseed {row['seed']}: {row['draw']}\n{row['text'][-1500:]}")
    return int(bool(findings))


def _short(row: dict) -> str:
    return "" if row["kind"] == "finding" else row["text"]


if __name__ == "__main__":
    raise SystemExit(main())
