"""What came of a draw: exact, refused as it must be, not run by DeepSpeed, or a finding."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.fuzz.draws import Draw
from tests.fuzz.runner import run
from tests.helpers.compare import weight_differences
from tests.helpers.reference import train
from tests.helpers.reports import report_differences
from tests.helpers.tolerance import BF16, FP32, Tolerance
from tests.integrations._ranks import Ranks

ALL_BF16 = Tolerance(gain=4e-2, report=1e-1, path=1e-1, rounding=2**-8)
LARGER = 2.0  # a small model shows bf16's rounding more


@dataclass(frozen=True)
class Verdict:
    """`kind`: "exact", "refused", "not run by DeepSpeed" or "finding". `text`: by what error, or what is wrong."""

    kind: str
    text: str = ""


def judge(draw: Draw, ranks: Ranks, folder: Path) -> Verdict:
    """Run a draw on its ranks and compare it with the float64 reference."""
    failure = ""
    try:
        answers = ranks.run(run, draw, str(folder))
    except AssertionError as error:  # a foreign exception, a rank that died or hung; the ranks were ended
        failure = str(error)
    if failure:
        return _without_lena(draw, ranks, folder, failure)
    refusals = [f"{answer['refused']}: {answer['text']}" for answer in answers if "refused" in answer]
    if refusals:
        is_one = len(refusals) == draw.world and len(set(refusals)) == 1
        is_right = draw.refused and draw.refused in refusals[0]
        return Verdict("refused", draw.refused) if is_one and is_right else Verdict("finding", "\n".join(refusals))
    if draw.refused:
        return Verdict("finding", f"not refused: {draw.refused}")
    found = _differences(draw, answers)
    return Verdict("finding", "\n".join(found)) if found else Verdict("exact")


def _without_lena(draw: Draw, ranks: Ranks, folder: Path, failure: str) -> Verdict:
    """Whether torch's AdamW fails in the same draw."""
    stock = replace(draw, optimizer="stock", base="adamw", lena={}, refused="")
    try:
        ranks.run(run, stock, str(folder))
    except AssertionError as error:
        if _exception(str(error)) == _exception(failure) is not None:
            return Verdict("not run by DeepSpeed", _exception(failure))
    return Verdict("finding", failure)


def _exception(told: str) -> str | None:
    """The exception that rank 0 ended with, if torch or DeepSpeed raised it."""
    trace = told.split("--- rank ")[1].strip().splitlines()
    frames = [line for line in trace if line.strip().startswith("File ")]
    is_foreign = bool(frames) and "site-packages" in frames[-1]
    return re.sub(r"\d+", "N", trace[-1].strip())[:100] if is_foreign else None  # numbers of parameters vary


def _differences(draw: Draw, answers: Sequence[dict[str, Any]]) -> list[str]:
    bounds = _tolerance(draw)
    model = draw.make_model(is_reference=True)
    snapshots = list(train(model, draw.param_groups(model, True), draw.keys, draw.reference_windows(), draw.settings))
    found = []
    for update, (report, snapshot) in enumerate(zip(answers[0]["reports"], snapshots, strict=True), start=1):
        found += [f"update {update}: {text}" for text in report_differences(report, snapshot.report, bounds)]
    for rank, answer in enumerate(answers):
        found += [f"rank {rank}: {text}" for text in weight_differences(answer["params"], snapshots, bounds)]
        if answer["reports"] != answers[0]["reports"]:
            found.append(f"rank {rank} reports other numbers than rank 0")
    return found


def _tolerance(draw: Draw) -> Tolerance:
    if draw.precision == "all bf16":
        return ALL_BF16
    if draw.precision in ("fp32", "fp64") and draw.config.get("communication_data_type") != "bf16":
        return FP32
    return Tolerance(LARGER * BF16.gain, LARGER * BF16.report, LARGER * BF16.path)
