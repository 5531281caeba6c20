"""The picture of a run: losses on the left, gain and warm-up of every layer on the right."""

import io
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, PercentFormatter, ScalarFormatter
from PIL import Image

History = list[dict[str, Any]]
Reports = list[tuple[int, dict[str, Any]]]  # (update, ds_lena.report)

# Kind of layer: patterns of its names, and a colour that colour-blind readers can tell from the others. The first kind
# that matches is taken; the legend reads from the last, drawn on top.
KINDS = {
    "layer norm": (("*ln_*", "*norm*", "*LayerNorm*"), "#B05FA0"),
    "bias": (("*.bias",), "#9A9A9A"),
    "attention weight": (("*attn*", "*attention*"), "#0072B2"),
    "MLP weight": (("*mlp*", "*intermediate*", "*output*"), "#009E73"),
    "embedding": (("*wte*", "*wpe*", "*embed*"), "#D55E00"),
    "other": (("*",), "#6B5B95"),
}
INK, FAINT = "#222222", "#6F6F6F"


def draw(history: History, unigram_loss: float, title: str, path: Path) -> None:
    """Draw the records of ``history.History``; without reports of LENA, the losses only."""
    reports = [(record["update"], record["lena"]) for record in history if "lena" in record]
    figure = Figure(figsize=(12, 5.6) if reports else (7, 4.6), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=13, color=INK)
    if reports:
        panels = [["losses", "gains"], ["losses", "warm-ups"]]
        axes = figure.subplot_mosaic(panels, height_ratios=(2.3, 1), width_ratios=(1, 1.25))
        _gains(axes["gains"], reports)
        _warmups(axes["warm-ups"], reports)
    else:
        axes = {"losses": figure.subplots()}
    _losses(axes["losses"], history, unigram_loss)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG of 64 colours that other readers see whole or not at all; no version of matplotlib in it."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", metadata={"Software": None})
    draft = path.with_name(path.name + ".draft")
    Image.open(drawn).convert("RGB").quantize(64).save(draft, format="png", optimize=True)
    draft.replace(path)


def _losses(axes: Axes, history: History, unigram_loss: float) -> None:
    train, held_out = ([(r["update"], r[key]) for r in history if key in r] for key in ("loss", "eval_loss"))
    axes.plot(*zip(*train, strict=True), color="#7FB2D6", linewidth=1.4, label="training")
    label = f"held-out, {held_out[-1][1]:.2f} at the end"
    axes.plot(*zip(*held_out, strict=True), color="#0B3C5D", linewidth=2, marker="o", markersize=4, label=label)
    label = f"unigram model, {unigram_loss:.2f}"
    axes.axhline(unigram_loss, color="#D55E00", linewidth=1.3, linestyle=(0, (5, 3)), label=label)
    axes.legend(frameon=False, fontsize=9, loc="upper right")
    dress(axes, "loss, nats per token")
    axes.set_xlabel("update", fontsize=9.5)


def _gains(axes: Axes, reports: Reports) -> None:
    _layer_lines(axes, reports, "gain")
    updates, last = [update for update, _ in reports], reports[-1][1]
    axes.plot(updates, [report["gain"] for _, report in reports], color=INK, linewidth=3, zorder=4)
    largest = max(last["n"] / last["base"], 1)
    for gain, rule in ((largest, "linear"), (largest**0.5, "sqrt")):
        axes.axhline(gain, color=FAINT, linewidth=0.9, linestyle=(0, (4, 4)), zorder=0)
        axes.annotate(rule, (1.01, gain), xycoords=("axes fraction", "data"), va="center", color=FAINT)
    axes.set_xlim(0, 1.01 * updates[-1])
    axes.set_yscale("log", base=2)
    axes.set_ylim(0.93, largest * 1.3)
    axes.yaxis.set_major_locator(FixedLocator([2.0**i for i in range(int(largest).bit_length())]))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    dress(axes, f"gain of each layer, n = {last['n']} micro-batches averaged")
    shown = {kind_of(name) for name in last["layers"]}
    legend = {"whole model": INK} | {kind: colour for kind, (_, colour) in reversed(KINDS.items()) if kind in shown}
    handles = [Line2D([], [], color=colour, linewidth=2.5, label=kind) for kind, colour in legend.items()]
    axes.legend(handles=handles, frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.06, 0.5))


def _warmups(axes: Axes, reports: Reports) -> None:
    _layer_lines(axes, reports, "warmup")
    axes.set_ylim(-0.03, 1.06)
    axes.yaxis.set_major_locator(FixedLocator([0, 0.5, 1]))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlim(0, 1.01 * reports[-1][0])
    dress(axes, "warm-up of each layer")
    axes.set_xlabel("update", fontsize=9.5)


def _layer_lines(axes: Axes, reports: Reports, key: str) -> None:
    """One thin line per layer: hue by kind, lighter towards the input."""
    updates, names = [update for update, _ in reports], list(reports[-1][1]["layers"])
    deepest = max(_depth(name, 0) for name in names)
    for name in names:
        white = 0.5 * (1 - _depth(name, deepest) / max(deepest, 1))
        colour = [channel + (1 - channel) * white for channel in to_rgb(KINDS[kind_of(name)][1])]
        values = [report["layers"][name][key] for _, report in reports]
        axes.plot(updates, values, color=colour, linewidth=1.1, zorder=2 + 0.1 * list(KINDS).index(kind_of(name)))


def kind_of(name: str) -> str:
    """The kind of the layer ``name``: a parameter, a module or a block."""
    return next(kind for kind, (patterns, _) in KINDS.items() if any(fnmatch(name, p) for p in patterns))


def _depth(name: str, outside: int) -> int:
    """The block's number in ``transformer.h.3.ln_1.weight``; ``outside`` where there is none."""
    number = re.search(r"\.(\d+)(\.|$)", name)
    return int(number[1]) if number else outside


def dress(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, color=INK)
    axes.grid(color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#BBBBBB")
    axes.tick_params(labelsize=9, color="#BBBBBB", labelcolor=INK)
    axes.margins(x=0.01)
