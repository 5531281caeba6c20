"""Pictures of a study: the losses of all methods, and what LENA measured by kind of tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from ..common.plot import FAINT, INK, KINDS, dress, kind_of, save
from .plan import Study
from .records import Record, Records
from .summary import Outcome, outcomes, seed_runs, targets

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#B05FA0", "#E69F00", "#56B4E9", "#6B5B95", "#9A9A9A", "#8C564B")
_SHOWN = len(_COLOURS)


def draw(studies: Mapping[str, Study], records: Records, folder: Path) -> None:
    """`STUDY.png` for each study with results, and `STUDY-gains.png` where LENA's numbers were kept."""
    for study in studies.values():
        found = outcomes(study, studies, [], records) if study.n > 1 else []
        # A batch that grows takes many more and smaller updates, which would not lie beside the others'.
        shown = [outcome for outcome in found if outcome.loss.values and "full_batch_at" not in outcome.settings]
        if shown:
            goals = targets(studies[study.base or study.name], records)
            save(_losses(study, shown, goals, records), folder / f"{study.name}.png")
        for outcome in found:
            run = seed_runs(study, outcome.method, records)[0]
            if outcome.method.name == "lena" and "lena" in run:
                save(_gains(study, run), folder / f"{study.name}-gains.png")


def _losses(study: Study, shown: Sequence[Outcome], goals: Sequence[float], records: Records) -> Figure:
    """Mean loss over the seeds against updates, the best methods in colour; the last two thirds of the scale."""
    figure = Figure(figsize=(8.5, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    curves = [_mean_curve(seed_runs(study, outcome.method, records)) for outcome in shown]
    for place, (outcome, curve) in enumerate(zip(shown, curves, strict=True)):
        colour = _COLOURS[place] if place < _SHOWN else FAINT
        label = f"{outcome.method.name}  {outcome.loss.mean:.3f}"
        axes.plot(*curve, color=colour, linewidth=1.8 if place < _SHOWN else 0.9, label=label)
    for goal in goals:
        axes.axhline(goal, color=FAINT, linewidth=0.9, linestyle=(0, (4, 4)), zorder=0)
        axes.annotate(f"{goal:.2f}", (1.005, goal), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    best = min(outcome.loss.mean for outcome in shown)
    highest = max(losses[0] for _, losses in curves)
    axes.set_xlim(0, 1.02 * study.task.micro_batches / study.n)
    axes.set_ylim(best - 0.03 * (highest - best), best + 0.66 * (highest - best))
    what = f"{study.task.measure} on the {study.split} split, mean of {len(study.seeds)} seeds"
    dress(axes, f"{study.name}: {what}, n = {study.n}")
    axes.set_xlabel("update; dashed: the single worker after 1/8, 1/4, 1/2 of its run", fontsize=9.5)
    axes.legend(edgecolor="none", framealpha=1.0, fontsize=8.5, title="at the end", title_fontsize=8.5)
    return figure


def _mean_curve(runs: Sequence[Record]) -> tuple[list[float], list[float]]:
    points = list(zip(*(run["curve"] for run in runs), strict=False))
    return [point[0][0] for point in points], [fmean(loss for _, _, loss in point) for point in points]


def _gains(study: Study, run: Record) -> Figure:
    """Gain and noise scale over the run: thin lines are tensors, thick ones the median of their kind."""
    figure = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    for axes, index, title in zip(figure.subplots(1, 2), (0, 1), ("gain", "noise scale, micro-batches"), strict=True):
        _by_kind(axes, run, index)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(ScalarFormatter())
        dress(axes, f"{study.name}: {title}, n = {study.n}")
        axes.set_xlabel("update", fontsize=9.5)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _by_kind(axes: Axes, run: Record, index: int) -> None:
    updates = [update for update, _ in run["lena"]]
    lines: dict[str, list[list[float | None]]] = defaultdict(list)
    for name in run["lena"][0][1]:
        lines["model" if name == "model" else kind_of(name)].append([told[name][index] for _, told in run["lena"]])
    for name, of_kind in lines.items():
        colour = INK if name == "model" else KINDS[name][1]
        for line in of_kind:
            axes.plot(updates, line, color=colour, linewidth=0.6, alpha=0.45)
        middle = [median(known) if (known := [v for v in at if v]) else None for at in zip(*of_kind, strict=True)]
        axes.plot(updates, middle, color=colour, linewidth=2.4, label=name)
