"""Kill ranks at random: `python -m tests.faults --trials 50 --seed 0 --out outputs/faults.jsonl`.

One line of JSON for each trial goes to the file. A run that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from tests.faults.fault import draw
from tests.faults.trial import trial


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--out", type=Path, default=Path("outputs/faults.jsonl"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    seeds = range(args.seed, args.seed + args.trials)
    known = {row["seed"]: row for row in read(args.out)}
    for seed in seeds:
        if seed in known:
            continue
        start, fault = time.monotonic(), draw(seed)
        with tempfile.TemporaryDirectory() as folder:
            try:
                verdict, text = trial(fault, Path(folder)), ""
            except Exception as error:  # of any kind: it is a finding, and the next trials count as well
                verdict, text = "finding", f"{type(error).__name__}: {error}"
        row = {"seed": seed, "verdict": verdict, "text": text, "fault": asdict(fault)}
        with args.out.open("a") as file:
            file.write(json.dumps(row | {"seconds": round(time.monotonic() - start, 1)}) + "\n")
        known[seed] = row
        print(seed, fault.place, verdict, flush=True)
    rows = [known[seed] for seed in seeds]
    for (place, verdict), count in sorted(Counter((row["fault"]["place"], row["verdict"]) for row in rows).items()):
        print(f"{count:4d}  {place}: {verdict}")
    findings = [row for row in rows if row["verdict"] == "finding"]
    for row in findings:
        print(f"\nseed {row['seed']}: {row['fault']}\n{row['text']}")
    return 1 if findings else 0


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    raise SystemExit(main())
