"""Have one rank of a run fail, start the run again, and compare its end with that of an unbroken run."""

from __future__ import annotations

import functools
import json
import subprocess
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from tests.faults.fault import Fault
from tests.integrations._programs import ROOT, attempt

SCRIPT = str(ROOT / "tests" / "faults" / "train.py")
BOUND = 60.0  # seconds from a death to the end of the job; without load it is about two
PATIENCE = 240.0
RELATIVE = 2e-4  # other ranks add in another order


def run(folder: Path, fault: Fault, *, world: int = 0) -> subprocess.CompletedProcess[str]:
    """`train.py` on the ranks of the fault, however it ends. A job that hangs raises `subprocess.TimeoutExpired`."""
    return attempt(SCRIPT, str(folder), json.dumps(asdict(fault)), ranks=world or fault.world, patience=PATIENCE)


@functools.cache
def unbroken(stage: int, precision: str) -> tuple[dict, list[torch.Tensor]]:
    """Report and weights of the run that nothing happens to, on two ranks."""
    with tempfile.TemporaryDirectory() as folder:
        done = run(Path(folder), Fault(stage=stage, precision=precision))
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return torch.load(Path(folder) / "end.pt")


def trial(fault: Fault, folder: Path) -> str:
    """What came out, else an AssertionError.

    "equal": the run went on from its checkpoint. "told": it named the file that the fault has torn; where there was an
    earlier checkpoint, it went on from that.
    """
    if fault.place == "load":
        stopped = run(folder, replace(fault, place="step"))
        assert stopped.returncode != 0 and (folder / "died").exists(), tail(stopped)
        (folder / "died").unlink()
    broken = run(folder, fault)
    folder.chmod(0o755)
    assert broken.returncode != 0 and (folder / "died").exists(), tail(broken)
    seconds = time.time() - (folder / "died").stat().st_mtime
    assert seconds < BOUND, f"the job ended {seconds:.0f} seconds after the death of a rank"
    assert not (folder / "end.pt").exists()
    again, verdict = _again(folder, fault), "equal"
    if again.returncode and fault.place in ("save", "after a file", "full disk", "anywhere"):
        text = again.stdout + again.stderr
        assert "errors.StateError: LENA: " in text and str(folder) in text, tail(again)
        verdict = "told"
        if fault.one_tag:
            return verdict
        # DeepSpeed has named the torn checkpoint, since rank 0 was done, or rank 0 died while it wrote the name.
        latest, saved = folder / "latest", [int(path.name.removeprefix("update")) for path in folder.glob("update*")]
        named = latest.read_text().removeprefix("update")
        latest.write_text(f"update{max(number for number in saved if not named or number < int(named))}")
        again = _again(folder, fault)
    assert again.returncode == 0, tail(again)
    compare(fault, torch.load(folder / "end.pt"))
    return verdict


def _again(folder: Path, fault: Fault) -> subprocess.CompletedProcess[str]:
    return run(folder, replace(fault, place=None, stage=fault.next_stage), world=fault.next_world)


def compare(fault: Fault, end: tuple[dict, list[torch.Tensor]]) -> None:
    report, weights = end
    wanted, wanted_weights = unbroken(fault.stage, fault.precision)
    assert report["update"] == wanted["update"] and report["n"] == wanted["n"]
    if not fault.moves:
        assert report == wanted
        assert all(torch.equal(a, b) for a, b in zip(weights, wanted_weights, strict=True))
        return
    for a, b in zip(weights, wanted_weights, strict=True):
        torch.testing.assert_close(a, b, rtol=RELATIVE, atol=RELATIVE * float(b.abs().max()))
    for name, layer in wanted["layers"].items():
        for key in ("gain", "warmup", "state"):
            assert abs(report["layers"][name][key] / layer[key] - 1) < 10 * RELATIVE, (name, key)


def tail(done: subprocess.CompletedProcess[str]) -> str:
    return f"status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
