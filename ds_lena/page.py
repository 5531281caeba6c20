"""One page of HTML from a run's log: noise scale, efficiency and batch over the run, and the layers as a heat map.

It needs nothing but Python, and the page nothing but a browser.
"""

from __future__ import annotations

import base64
import html
import json
import math
import struct
import zlib
from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from .errors import ConfigError

Record = dict[str, Any]
Point = tuple[float, float]

WIDTH, LEFT, RIGHT = 900, 260, 20
"""Of every drawing: the names of layers stand on the left, and all lines up from top to bottom."""
UNITS = ("tokens", "samples", "micro_batches", "update")
"""What a run is measured by on the page: the first that all records have, and that never falls."""

_COLORS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # viridis
_NOTHING = (225, 225, 225)
_COLUMNS = 400
_MOST = 1e300  # beyond it, and below 1 / _MOST, a float has no power of ten for the end of a scale

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222; }
svg { width: 100%; height: auto; } text { font-size: 12px; fill: #444; }
.grid { stroke: #e5e5e5; } .noise { stroke: #21918c; fill: none; stroke-width: 2; } .band { fill: #21918c22; }
.batch { stroke: #d1495b; fill: none; stroke-width: 1.5; } .note { color: #666; }
table { border-collapse: collapse; } td, th { padding: 0.1em 0.8em; text-align: right; } td:first-child, th:first-child
{ text-align: left; }
"""


def read(path: Path) -> tuple[list[Record], int]:
    """The reports in a log by `ds_lena.watch(…, log=…)`, or in the examples' `history.jsonl`, in the order of updates.

    A run that was resumed has overwritten what it did again.

    Returns:
        The reports, and how many lines were left out because they are none: torn, empty or of something else.

    Raises:
        ConfigError: there is no such file, or no report in it.
    """
    if not path.is_file():
        raise ConfigError(f"ds_lena.report: there is no file {path}. Give the JSON lines that a watch has written.")
    records: list[Record] = []
    skipped = 0
    with path.open("rb") as lines:
        for line in lines:
            record = _report_in(line)
            if record is None:
                skipped += 1
                continue
            while records and records[-1]["update"] >= record["update"]:
                records.pop()
            records.append(record)
    if not records:
        raise ConfigError(
            f"ds_lena.report: no line of {path} is a report. Allowed are the log of "
            "ds_lena.watch(…, log=FILE) and the history.jsonl of a LENA in the examples. Give one of these."
        )
    return records, skipped


def _report_in(line: bytes) -> Record | None:
    """The report in a line, with None for each number that is not finite or is something else. None if it has none."""
    try:
        found: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    found = found.get("lena", found) if isinstance(found, dict) else None
    layers = found.get("layers") if isinstance(found, dict) else None
    if not isinstance(layers, dict) or not all(isinstance(layer, dict) for layer in layers.values()):
        return None
    record = _numbers(found)
    if record.get("update") is None or record.get("n") is None or "noise_scale" not in record:
        return None
    layers = {name: _numbers(layer) for name, layer in layers.items()}
    return record | {"layers": layers, "advice": str(found.get("advice") or "")}


def _numbers(found: Mapping[str, Any]) -> Record:
    return {key: value if _is_number(value) else None for key, value in found.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _MOST


def make(records: Sequence[Record], title: str) -> str:
    """The page."""
    unit = next(unit for unit in UNITS if _rises([record.get(unit) for record in records]))
    at = [float(record[unit]) for record in records]
    last = records[-1]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>After {last['update']:,} updates: {html.escape(last['advice'])}.</p>" if last.get("advice") else "",
        "<h2>Noise scale and batch, in micro-batches</h2>",
        '<p class="note">Line: noise scale, with its interval of about 95 %. Red: the batch, n. Below the line a '
        "larger batch saves updates at little cost; far above it, it saves hardly any.</p>",
        _scales(records, at, unit),
        "<h2>Efficiency</h2>",
        '<p class="note">What an update is worth in updates of one micro-batch, as a share of n.</p>',
        _efficiencies(records, at, unit),
        "<h2>Layers</h2>",
        _layers(records, at, unit),
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style>{''.join(parts)}</html>\n"
    )


def _rises(values: Sequence[Any]) -> bool:
    return None not in values and all(before <= after for before, after in pairwise(values))


# -- curves -----------------------------------------------------------------------------------------------------------


class _Plot:
    """Places points: the run from left to right, a value from bottom to top."""

    def __init__(self, at: Sequence[float], low: float, high: float, height: int, is_log: bool, unit: str) -> None:
        self._at, self._height, self._unit = at, height, unit
        self._map: Callable[[float], float] = math.log10 if is_log else lambda value: value
        self._low, self._high, self._is_log = self._map(low), self._map(high), is_log
        self._limits = low, high

    def x(self, at: float) -> float:
        return LEFT + (at - self._at[0]) / (self._at[-1] - self._at[0] or 1) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        value = min(max(value, self._limits[0]), self._limits[1])
        return 10 + (self._high - self._map(value)) / (self._high - self._low) * (self._height - 10)

    def path(self, points: Sequence[Point], name: str, steps: bool = False) -> str:
        drawn = ""
        for i, (at, value) in enumerate(points):
            step = f"H{self.x(at):.1f}" if steps and i else ""
            drawn += f"{step}{'L' if i else 'M'}{self.x(at):.1f} {self.y(value):.1f}"
        return f'<path class="{name}" d="{drawn}"/>'

    def band(self, points: Sequence[tuple[float, float, float]]) -> str:
        edge = [(at, low) for at, low, _ in points] + [(at, high) for at, _, high in reversed(points)]
        return f'<polygon class="band" points="{" ".join(f"{self.x(a):.1f},{self.y(v):.1f}" for a, v in edge)}"/>'

    def ticks(self) -> list[float]:
        if self._is_log:
            return [10.0**k for k in range(math.ceil(self._low - 1e-9), math.floor(self._high + 1e-9) + 1)]
        return [self._low + (self._high - self._low) * k / 4 for k in range(5)]

    def svg(self, *drawn: str) -> str:
        end = WIDTH - RIGHT
        grid = "".join(
            f'<path class="grid" d="M{LEFT} {self.y(t):.1f}H{end}"/>'
            f'<text x="{LEFT - 8}" y="{self.y(t) + 4:.1f}" text-anchor="end">{t:g}</text>'
            for t in self.ticks()
        )
        return _svg(grid + "".join(drawn), self._at, self._height, self._unit)


def _svg(drawn: str, at: Sequence[float], height: int, unit: str) -> str:
    """What was drawn, and below it where the run begins and ends."""
    ends = ((LEFT, "start", f"{at[0]:,.0f}"), (WIDTH - RIGHT, "end", f"{at[-1]:,.0f}"))
    axis = "".join(
        f'<text x="{x}" y="{height + 18}" text-anchor="{anchor}">{text}</text>'
        for x, anchor, text in (*ends, ((LEFT + WIDTH - RIGHT) // 2, "middle", unit.replace("_", "-")))
    )
    return f'<svg viewBox="0 0 {WIDTH} {height + 26}">{drawn}{axis}</svg>'


def _scales(records: Sequence[Record], at: Sequence[float], unit: str) -> str:
    pairs = list(zip(at, records, strict=True))
    scale = [(x, r["noise_scale"]) for x, r in pairs if _is_positive(r["noise_scale"])]
    batch = [(x, float(r["n"])) for x, r in pairs if _is_positive(r["n"])]
    values = [value for _, value in scale + batch] or [1.0]
    low, high = 10.0 ** math.floor(math.log10(min(values))), 10.0 ** math.ceil(math.log10(max(values)) + 1e-9)
    high = max(high, 10 * low)
    band = [
        (x, r.get("noise_scale_low") or low, r.get("noise_scale_high") or high)
        for x, r in pairs
        if "noise_scale_low" in r and _is_positive(r["noise_scale"])
    ]
    plot = _Plot(at, low, high, 300, True, unit)
    return plot.svg(plot.band(band), plot.path(batch, "batch", steps=True), plot.path(scale, "noise"))


def _efficiencies(records: Sequence[Record], at: Sequence[float], unit: str) -> str:
    plot = _Plot(at, 0.0, 1.0, 160, False, unit)
    found = [(x, _efficiency(record)) for x, record in zip(at, records, strict=True) if _is_positive(record["n"])]
    return plot.svg(plot.path([(x, share) for x, share in found if share is not None], "noise"))


def _efficiency(record: Record) -> float | None:
    """Of a LENA's own report it is made from the noise scale, by the formula of the gain."""
    if "efficiency" in record:
        return record["efficiency"]
    scale, n = record["noise_scale"], record["n"]
    return (scale + 1) / (scale + n) if _is_positive(scale) else 1.0


def _is_positive(value: float | None) -> bool:
    return value is not None and 1 / _MOST < value < _MOST


# -- layers -----------------------------------------------------------------------------------------------------------


def _layers(records: Sequence[Record], at: Sequence[float], unit: str) -> str:
    """A row of pixels for each layer, in each column the record that is nearest; and the numbers at the end."""
    names = list(records[-1]["layers"])
    halfway = [(before + after) / 2 for before, after in pairwise(at)]
    places = (at[0] + (at[-1] - at[0]) * (column + 0.5) / _COLUMNS for column in range(_COLUMNS))
    columns = [records[bisect(halfway, place)] for place in places]
    logs = [[_log_scale(record["layers"].get(name)) for record in columns] for name in names]
    known = [value for row in logs for value in row if value is not None]
    if not known:
        return '<p class="note">No layer has a signal above its noise yet.</p>'
    low, high = min(known), max(max(known), min(known) + 1e-9)
    pixels = [[_NOTHING if v is None else _color((v - low) / (high - low)) for v in row] for row in logs]
    row = 16 if len(names) <= 60 else 8
    height = row * len(names)
    labels = "".join(
        f'<text x="{LEFT - 6}" y="{row * i + row - 4}" text-anchor="end" style="font-size:{row - 4}px">'
        f"{html.escape(name[-42:])}</text>"
        for i, name in enumerate(names)
    )
    image = (
        f'<image x="{LEFT}" width="{WIDTH - LEFT - RIGHT}" height="{height}" preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" href="data:image/png;base64,{base64.b64encode(_png(pixels)).decode()}"/>'
    )
    note = (
        f'<p class="note">Noise scale of each layer over {unit.replace("_", "-")}: dark is {10**low:.3g} '
        f"micro-batches, yellow {10**high:.3g}, on a logarithmic scale. Grey: no signal above the noise. Each column "
        "shows the report that is nearest.</p>"
    )
    table = "".join(f"<tr><td>{html.escape(name)}</td>{_cells(records[-1]['layers'][name])}</tr>" for name in names)
    return (
        f"{note}{_svg(labels + image, at, height, unit)}<details><summary>Numbers at the end</summary>"
        f"<table><tr><th>layer</th><th>noise</th><th>signal</th><th>noise scale</th></tr>{table}</table></details>"
    )


def _cells(layer: Record) -> str:
    found = (layer.get(key) for key in ("noise", "signal", "noise_scale"))
    return "".join(f"<td>{'-' if value is None else f'{value:.3g}'}</td>" for value in found)


def _log_scale(layer: Record | None) -> float | None:
    scale = None if layer is None else layer.get("noise_scale")
    return math.log10(float(scale)) if scale is not None and _is_positive(scale) else None


def _color(share: float) -> tuple[int, ...]:
    place = share * (len(_COLORS) - 1)
    i = min(int(place), len(_COLORS) - 2)
    return tuple(round(a + (b - a) * (place - i)) for a, b in zip(_COLORS[i], _COLORS[i + 1], strict=True))


def _png(rows: Sequence[Sequence[tuple[int, ...]]]) -> bytes:
    """An image of these pixels (red, green, blue), as https://www.w3.org/TR/png/ says."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 2, 0, 0, 0)
    pixels = b"".join(b"\0" + bytes(value for pixel in row for value in pixel) for row in rows)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
