"""Pictures: the losses of a study's methods, what LENA measured by kind of tensor, and a task's front."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from ..common.plot import FAINT, INK, KINDS, dress, kind_of
from .front import Point, lines, points
from .optimizers import GROWS
from .plan import Study
from .runs import Runs
from .tables import Outcome, outcomes, targets

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#B05FA0", "#E69F00", "#56B4E9", "#6B5B95", "#9A9A9A", "#8C564B")
_SHOWN = len(_COLOURS)
_FIXED = {
    "single-worker": ("s", _COLOURS[0]),
    "adamw": ("o", _COLOURS[0]),
    "lena-as-is": ("o", _COLOURS[1]),
    "muon": ("o", _COLOURS[2]),
    "muon-kept": ("D", _COLOURS[2]),
    "batch-warmup": ("^", _COLOURS[3]),
}
"""Marker and colour of the methods that a front names, beside those that follow the noise."""
_BASES = {"adamw": _COLOURS[0], "lena": _COLOURS[1], "muon": _COLOURS[2], "norm": _COLOURS[4]}
"""Colour of the lines of a front, by how their names begin."""
Gains = Sequence[tuple[int, Mapping[str, Sequence[float | None]]]]
"""Rows of (update, {layer: (gain, noise scale)})."""


def draw(studies: Collection[Study], runs: Runs, folder: Path) -> None:
    """`STUDY.svg` for each study that asks for it, and `STUDY-gains.svg` where LENA's numbers were kept.

    And `TASK-front.svg` where batches follow the noise.
    """
    for study in studies:
        if study.base is None and (front := points(study, studies, runs)):
            _save(_front(study, front), folder / f"{study.task.name}-front.svg")
        found = outcomes(study, runs) if study.picture else []
        # A batch that grows takes many more and smaller updates, which would not lie beside the others'.
        shown = [outcome for outcome in found if outcome.loss is not None and not GROWS & outcome.settings.keys()]
        if shown:
            _save(_losses(study, shown, targets(study, runs)), folder / f"{study.name}.svg")
        for outcome in found:
            if gains := outcome.runs[0].user_attrs.get("gains"):
                _save(_gains(study, gains), folder / f"{study.name}-gains.svg")


def _losses(study: Study, shown: Sequence[Outcome], goals: Sequence[float]) -> Figure:
    """Mean loss over the seeds against updates, the best methods in colour; the last two thirds of the scale."""
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axes = figure.subplots()
    highest = 0.0
    for place, outcome in enumerate(shown):
        points = list(zip(*outcome.curves, strict=False))
        losses = [fmean(loss for _, _, loss in point) for point in points]
        highest = max(highest, losses[0])
        style: dict[str, Any] = {"color": FAINT, "linewidth": 0.9}
        if place < _SHOWN:
            style = {"color": _COLOURS[place], "linewidth": 1.8}
        label = f"{outcome.method.name}  {outcome.loss:.3f}"
        axes.plot([point[0][0] for point in points], losses, label=label, **style)
    for goal in goals:
        axes.axhline(goal, color=FAINT, linewidth=0.9, linestyle=(0, (4, 4)), zorder=0)
        axes.annotate(f"{goal:.2f}", (1.005, goal), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    best = shown[0].loss
    axes.set_xlim(0, 1.02 * study.task.micro_batches / study.n)
    axes.set_ylim(best - 0.03 * (highest - best), best + 0.66 * (highest - best))
    what = f"{study.task.measure} on the {study.split} split, mean of {len(study.seeds)} seeds"
    dress(axes, f"{study.name}: {what}, n = {study.n}")
    axes.set_xlabel("update; dashed: the single worker after 1/8, 1/4, 1/2 of its run", fontsize=9.5)
    axes.legend(edgecolor="none", framealpha=1.0, fontsize=8.5, title="at the end", title_fontsize=8.5)
    return figure


def _front(single: Study, found: Sequence[Point]) -> Figure:
    """Loss against updates: thick lines are batches that follow the noise, thin ones fixed and planned ones."""
    figure = Figure(figsize=(8.5, 6), layout="constrained")
    axes = figure.subplots()
    for family, line in sorted(lines(point for point in found if point.follows_noise).items()):
        style = {"linestyle": (0, (4, 2))} if family.endswith("price") else {}
        colour = _BASES.get(family.partition("-")[0], INK)
        updates, losses, batches = zip(*line, strict=True)
        axes.plot(updates, losses, color=colour, marker="*", markersize=8, linewidth=1.8, label=family, **style)
        _tell(axes, zip(updates, losses, batches, strict=True), colour, offset=-12)
    others = lines(point for point in found if not point.follows_noise)
    for family, (marker, colour) in _FIXED.items():
        if family in others:
            updates, losses, batches = zip(*others.pop(family), strict=True)
            style = {"marker": marker, "markerfacecolor": "none", "linewidth": 0.7, "linestyle": ":"}
            axes.plot(updates, losses, color=colour, label=family, **style)
            _tell(axes, zip(updates, losses, batches, strict=True), colour, offset=6)
    rest = [point for line in others.values() for point in line]
    if rest:
        axes.plot(*zip(*[point[:2] for point in rest], strict=True), ".", color="#BBBBBB", zorder=0, label="others")
    lowest = min((point.place[1] for point in found if point.place), default=0.0)
    axes.set_ylim(lowest - 0.05, lowest + 0.7)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    task = single.task
    dress(axes, f"{task.name}: {task.measure} on the test split after {task.micro_batches:,} micro-batches")
    axes.set_xlabel("updates; stars: the batch follows the noise scale (×) or its root (r); n: fixed, or planned")
    axes.legend(frameon=False, fontsize=8.5, loc="upper right")
    return figure


def _tell(axes: Axes, points: Iterable[tuple[float, float, str]], colour: str, offset: float) -> None:
    for x, y, words in points:
        style = {"ha": "center", "color": colour, "fontsize": 7, "annotation_clip": True}
        axes.annotate(words, (x, y), (0, offset), textcoords="offset points", **style)


def _gains(study: Study, rows: Gains) -> Figure:
    """Gain and noise scale over the run: thin lines are tensors, thick ones the median of their kind."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for axes, index, title in zip(figure.subplots(1, 2), (0, 1), ("gain", "noise scale, micro-batches"), strict=True):
        _by_kind(axes, rows, index)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(ScalarFormatter())
        dress(axes, f"{study.name}: {title}, n = {study.n}")
        axes.set_xlabel("update", fontsize=9.5)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _by_kind(axes: Axes, rows: Gains, index: int) -> None:
    updates = [update for update, _ in rows]
    lines: dict[str, list[list[float | None]]] = defaultdict(list)
    for name in rows[0][1]:
        lines["model" if name == "model" else kind_of(name)].append([told[name][index] for _, told in rows])
    for name, of_kind in lines.items():
        colour = INK if name == "model" else KINDS[name][1]
        for line in of_kind:
            axes.plot(updates, line, color=colour, linewidth=0.6, alpha=0.45)
        middle = [median(known) if (known := [v for v in at if v]) else None for at in zip(*of_kind, strict=True)]
        axes.plot(updates, middle, color=colour, linewidth=2.4, label=name)


def _save(figure: Figure, path: Path) -> None:
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": path.name}):  # the same picture whenever it is drawn
        figure.savefig(path, metadata={"Date": None, "Creator": None})
