"""The page of a run's log: `python -m ds_lena.report`."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest

import ds_lena
from ds_lena import page


def record(update: int, scale: float | None = 8.0, n: int = 4, **more: Any) -> dict[str, Any]:
    layers = {"a": {"noise": 8.0, "signal": 1.0, "noise_scale": scale}, "b<c>": {"noise": 1.0, "noise_scale": None}}
    return {"update": update, "n": n, "noise_scale": scale, "layers": layers} | more


def log(folder: Path, records: list[Any], end: str = "") -> Path:
    path = folder / "run.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in records) + end)
    return path


def test_a_resumed_run_has_its_last_numbers_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    path = log(tmp_path, [record(10), record(20), record(30), record(20, 9.0), record(30, 10.0)], '{"update": 40, "n"')
    assert [(r["update"], r["noise_scale"]) for r in page.read(path)] == [(10, 8.0), (20, 9.0), (30, 10.0)]


def test_the_history_of_the_examples_can_be_read(tmp_path: Path) -> None:
    path = log(tmp_path, [{"update": 1, "loss": 2.0, "lena": record(1)}, {"update": 1, "eval_loss": 2.0}])
    assert page.read(path) == [record(1)]
    assert page._efficiency(record(1)) == pytest.approx((8 + 1) / (8 + 4))


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "there is no file"), ('{"loss": 1}\n', "nothing was measured"), ("oh\n{}\n", "line 1 is no JSON")],
)
def test_what_is_no_log_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "run.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ds_lena.ConfigError, match=message):
        page.read(path)


def test_the_curves_stand_where_the_numbers_are() -> None:
    """From 1 to 100 on a logarithmic scale: 10 is half way up. The samples 0, 50, 200 are a quarter and all the way."""
    points = ((1, 1.0, 0), (2, 10, 50), (3, 100, 200))
    records = [record(update, scale, n=10, samples=samples) for update, scale, samples in points]
    made = page.make(records, "run")
    (noise,) = re.findall(r'class="noise" d="([^"]+)"', made)[:1]
    placed = [tuple(map(float, point.split())) for point in re.split("[ML]", noise)[1:]]
    (x0, y0), (x1, y1), (x2, y2) = placed
    assert (x1 - x0) / (x2 - x0) == pytest.approx(0.25, abs=0.002)
    assert (y0 - y1) / (y0 - y2) == pytest.approx(0.5, abs=0.002)
    (batch,) = re.findall(r'class="batch" d="([^"]+)"', made)
    assert {float(y) for y in re.findall(r" ([\d.]+)", batch)} == {y1}, "the batch of 10 is level with a scale of 10"
    assert ">samples<" in made and ">200<" in made


def test_the_heat_map_has_a_row_for_each_layer_and_grey_where_nothing_is_known() -> None:
    made = page.make([record(update, scale) for update, scale in ((1, 1.0), (2, 100.0), (3, None))], "run")
    image = base64.b64decode(re.findall(r"base64,([^\"]+)", made)[0])
    width, height = (int.from_bytes(image[at : at + 4], "big") for at in (16, 20))
    assert (width, height) == (3, 2)
    data = image[image.index(b"IDAT") + 4 : image.index(b"IEND") - 8]
    rows = zlib.decompress(data)
    first = [tuple(rows[1 + 3 * i : 4 + 3 * i]) for i in range(3)]
    assert first == [page._COLORS[0], page._COLORS[-1], page._NOTHING]
    assert "b&lt;c&gt;" in made and "b<c>" not in made


def test_nothing_is_fetched_from_elsewhere() -> None:
    made = page.make([record(1), record(2)], "run")
    assert not re.search(r"(src|href)=\"(?!data:)", made)


def test_the_command(tmp_path: Path) -> None:
    path = log(tmp_path, [record(1, samples=8, advice="noise scale 8 micro-batches"), record(2, samples=16)])
    command = [sys.executable, "-m", "ds_lena.report"]
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "run.html")
    assert (tmp_path / "run.html").read_text().startswith("<!doctype html>")
    failed = subprocess.run([*command, str(tmp_path / "no.jsonl")], capture_output=True, text=True, check=False)
    assert failed.returncode == 1 and "there is no file" in failed.stderr and "Traceback" not in failed.stderr


def test_to_python_it_stays_a_function() -> None:
    with pytest.raises(ImportError, match="is a function"):
        __import__("ds_lena.report")
    assert callable(ds_lena.report)
