"""The results as markdown."""

from __future__ import annotations

from typing import Any


def markdown(results: dict[str, Any]) -> str:
    """What was measured where, then the tables that fit the kind of run."""
    cases = results["cases"]
    if "syncs" in cases[0]:
        tables = [_syncs(cases)]
    elif "stage" in cases[0]:
        tables = [_updates(cases), _phases(cases)]
    else:
        tables = [_alone(cases[0], results["settings"])]
    return "\n\n".join([_heading(results), *tables])


def progress(case: dict[str, Any]) -> str:
    """One line about a case of engines, to show while the others run."""
    found = case["syncs"] if "syncs" in case else f"{case['compared']['update']['ratio_of_medians']:.3f} x AdamW"
    return f"ZeRO {case['stage']}, accumulation {case['accumulation']}: {found}"


def _heading(results: dict[str, Any]) -> str:
    machine, settings = results["machine"], results["settings"]
    hardware = ", ".join(machine["accelerators"] or [f"{machine['cpu']}, {machine['cores']} cores"])
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return "\n".join(
        [
            f"`{results['command']}`",
            "",
            f"- {hardware}; load average before the run {machine['load_average']:.1f}",
            f"- model {settings['model']}, {settings['tokens']} tokens per micro-batch, {settings['precision']}; "
            f"ranks: {settings['ranks']}, threads on each: {settings['threads']}; "
            f"{settings['clock']} time",
            f"- {versions}, commit {machine['commit'] or 'unknown'}",
        ]
    )


def _updates(cases: list[dict[str, Any]]) -> str:
    head = ["ZeRO", "accumulation", "pairs", "AdamW ms", "LENA ms", "ratio of medians", "of minima", "of pairs"]
    rows = []
    for case in cases:
        update = case["compared"]["update"]
        rows.append(
            [
                str(case["stage"]),
                str(case["accumulation"]),
                str(update["pairs"]),
                _ms(update["adamw"]),
                _ms(update["lena"]),
                f"**{update['ratio_of_medians']:.3f}**",
                f"{update['ratio_of_minima']:.3f}",
                _spread(update["paired_ratio"], ".3f"),
            ]
        )
    return "Time of one update, LENA's as a multiple of fused AdamW's.\n\n" + _table(head, rows)


def _phases(cases: list[dict[str, Any]]) -> str:
    head = ["ZeRO", "accumulation"]
    for phase in ("forward+backward", "step"):
        head += [f"{phase}: AdamW ms", "LENA ms", "added ms"]
    rows = []
    for case in cases:
        row = [str(case["stage"]), str(case["accumulation"])]
        for phase in ("forward_backward", "step"):
            row += _added(case["compared"][phase])
        rows.append(row)
    return "Where it goes: the hooks are in forward+backward, all else is in the step.\n\n" + _table(head, rows)


def _alone(case: dict[str, Any], settings: dict[str, Any]) -> str:
    head = ["", "pairs", "AdamW ms", "LENA ms", "added ms", "ratio of medians", "of minima", "of pairs"]
    rows = []
    for phase, title in (("backward", "adding up gradients"), ("step", "step")):
        compared = case["compared"][phase]
        rows.append(
            [
                title,
                str(compared["pairs"]),
                *_added(compared),
                f"{compared['ratio_of_medians']:.3f}",
                f"{compared['ratio_of_minima']:.3f}",
                _spread(compared["paired_ratio"], ".3f"),
            ]
        )
    hooks, whole = case["compared"]["backward"]["added"]["median"], case["model_pass"]
    return _table(head, rows) + (
        f"\n\nA forward and backward pass of the model over {settings['tokens']} tokens takes {_ms(whole)} ms; "
        f"what LENA adds to backward is {hooks / whole:.1%} of it."
    )


def _syncs(cases: list[dict[str, Any]]) -> str:
    head = ["ZeRO", "accumulation", "phase", "AdamW", "LENA"]
    rows = []
    for case in cases:
        layout = [str(case.get("stage", "none")), str(case.get("accumulation", 1))]
        counts = case["syncs"]
        rows += [[*layout, phase, str(counts["adamw"][phase]), str(counts["lena"][phase])] for phase in counts["lena"]]
    return "How often the host waits for the GPU in one update.\n\n" + _table(head, rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---:"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _added(compared: dict[str, Any]) -> list[str]:
    added = {name: 1000 * seconds for name, seconds in compared["added"].items()}
    return [_ms(compared["adamw"]), _ms(compared["lena"]), _spread(added, "+.1f")]


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f}"


def _spread(quartiles: dict[str, float], form: str) -> str:
    """The median, and the middle half of the values behind it."""
    return f"{quartiles['median']:{form}} [{quartiles['q1']:{form}}, {quartiles['q3']:{form}}]"
