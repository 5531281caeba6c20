"""Results as markdown: what all benchmarks share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Rows = list[list[str]]
Compared = Mapping[str, Mapping[str, Any]]
"""One phase of `timing.compare`: contestant -> its numbers."""


def heading(results: Mapping[str, Any]) -> str:
    """Under which circumstances it was measured, and what was left out."""
    machine = results["machine"]
    hardware = ", ".join(machine["accelerators"] or [f"{machine['cpu']}, {machine['cores']} cores"])
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"`{results['command']}`",
        "",
        f"- {hardware}; load average before the run {machine['load_average']:.1f}",
        f"- {'; '.join(f'{name} {_setting(value)}' for name, value in results['settings'].items() if value)}",
        f"- {versions}, commit {machine['commit'] or 'unknown'}",
        *(f"- left out: {name}: {reason}" for name, reason in results["left_out"].items()),
    ]
    return "\n".join(lines)


def table(head: Sequence[str], rows: Rows) -> str:
    lines = [list(head), ["---:"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def versus_head(reference: str) -> list[str]:
    """Over the columns of `versus`."""
    ratios = ["ratio of medians", "of minima", "within rounds"]
    return ["optimizer", "rounds", f"{reference}, ms", "ms", *ratios, "added ms"]


def versus(cells: Sequence[str], compared: Compared, reference: str) -> Rows:
    """A row for every contestant but the reference, with these cells in front."""
    theirs = ms(compared[reference]["median"])
    return [
        [
            *cells,
            name,
            str(own["rounds"]),
            theirs,
            ms(own["median"]),
            f"**{own['ratio_of_medians']:.3f}**",
            f"{own['ratio_of_minima']:.3f}",
            spread(own["paired_ratio"], ".3f"),
            added(own),
        ]
        for name, own in compared.items()
        if name != reference
    ]


def syncs(head: Sequence[str], cases: Sequence[tuple[Sequence[str], Mapping[str, Mapping[str, int]]]]) -> str:
    """`cases`: the cells in front, and by contestant and phase how often the host waited for the GPU."""
    rows = [
        [*cells, name, phase, str(count)]
        for cells, counts in cases
        for name, phases in counts.items()
        for phase, count in phases.items()
    ]
    return "How often the host waits for the GPU in one update.\n\n" + table(
        [*head, "optimizer", "phase", "waits"], rows
    )


def added(own: Mapping[str, Any]) -> str:
    """Milliseconds more than the reference, with quartiles."""
    return spread({name: 1000 * seconds for name, seconds in own["added"].items()}, "+.1f")


def ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f}"


def spread(quartiles: Mapping[str, float], form: str) -> str:
    """The median, and the middle half of the values behind it."""
    return f"{quartiles['median']:{form}} [{quartiles['q1']:{form}}, {quartiles['q3']:{form}}]"


def _setting(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
