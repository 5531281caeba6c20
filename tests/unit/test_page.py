"""The page of a run's log: `python -m ds_lena.report`."""

from __future__ import annotations

import base64
import json
import math
import re
import runpy
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


def log(folder: Path, records: list[Any], name: str = "run.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return path


def test_a_resumed_run_has_its_last_numbers(tmp_path: Path) -> None:
    path = log(tmp_path, [record(10), record(20), record(30), record(20, 9.0), record(30, 10.0)])
    records, skipped = page.read(path)
    assert [(r["update"], r["noise_scale"]) for r in records] == [(10, 8.0), (20, 9.0), (30, 10.0)]
    assert skipped == 0


def test_the_history_of_the_examples_can_be_read(tmp_path: Path) -> None:
    path = log(tmp_path, [{"update": 1, "loss": 2.0, "lena": record(1)}, {"update": 1, "eval_loss": 2.0}])
    (found,), skipped = page.read(path)
    assert found == record(1) | {"advice": ""} and skipped == 1
    assert page._efficiency(found) == pytest.approx((8 + 1) / (8 + 4))


def line(**changed: Any) -> bytes:
    """A report, but for this."""
    return json.dumps(record(2) | changed).encode()


def without(key: str) -> bytes:
    return json.dumps({name: value for name, value in record(2).items() if name != key}).encode()


NO_REPORTS = {
    "torn": line()[:30],
    "torn, and the next after it": line()[:30] + line(),
    "empty": b"",
    "no text": b"\xff\x00\x80",
    "nested too deep": b"[" * 100_000,
    "a number of too many digits": b"1" * 5000,
    "a list": b"[1]",
    "of a loss": b'{"update": 2, "loss": 1.0}',
    "lena is a number": b'{"update": 2, "lena": 3}',
    "lena is null": b'{"update": 2, "lena": null}',
    "no update": without("update"),
    "layers are a list": line(layers=[1]),
    "a layer is a number": line(layers={"a": 1}),
    "update is a text": line(update="2"),
    "update is true": line(update=True),
    "no n": without("n"),
    "n is infinite": line(n=math.inf),
    "n is too large": line(n=10**400),
    "no noise scale": without("noise_scale"),
}


@pytest.mark.parametrize("what", NO_REPORTS)
def test_a_line_that_is_no_report_is_left_out_and_counted(tmp_path: Path, what: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(b"\n".join([json.dumps(record(1)).encode(), NO_REPORTS[what], json.dumps(record(3)).encode()]))
    records, skipped = page.read(path)
    assert [found["update"] for found in records] == [1, 3] and skipped == 1
    path.write_bytes(NO_REPORTS[what] + b"\n")
    with pytest.raises(ds_lena.ConfigError, match="is a report"):
        page.read(path)


@pytest.mark.parametrize(
    "odd",
    [
        {"efficiency": None},
        {"noise_scale_low": math.nan},
        {"noise_scale_high": "9"},
        {"noise_scale": {}},
        {"noise_scale": 1e308},
        {"noise_scale": 5e-324},
        {"n": 0},
        {"samples": "many"},
        {"tokens": 10**400},
        {"advice": 3},
        {"layers": {"a": {"noise": "2", "signal": math.inf, "noise_scale": [1]}}},
        {"layers": {}},
    ],
)
def test_an_odd_number_is_a_gap(tmp_path: Path, odd: dict[str, Any]) -> None:
    """In the middle of a run, at its end, and alone."""
    plain = {"samples": 8, "efficiency": 0.5, "noise_scale_low": 4.0, "noise_scale_high": 9.0}
    run = [record(update, **plain) for update in (1, 2, 3)]
    for records in ([run[0], run[1] | odd, run[2]], [*run[:2], run[2] | odd], [run[0] | odd]):
        made = page.make(page.read(log(tmp_path, records))[0], "run")
        assert not re.search(r"\b(nan|inf|None)\b", made)


def test_an_efficiency_that_is_not_known_is_left_out() -> None:
    made = page.make([record(update, efficiency=share) for update, share in ((1, 0.5), (2, None), (3, 0.5))], "run")
    efficiency = re.findall(r'class="noise" d="([^"]+)"', made)[1]
    assert len(re.split("[ML]", efficiency)[1:]) == 2


def test_one_report_of_a_long_run_is_a_page() -> None:
    assert "nan" not in page.make([record(1, tokens=10**15)], "run")


def test_tokens_that_fall_are_no_axis() -> None:
    """As where a resumed run was told of other tokens in a sample."""
    made = page.make([record(1, samples=8, tokens=80), record(2, samples=16, tokens=16)], "run")
    assert ">samples<" in made and ">tokens<" not in made


def test_a_file_that_is_missing_is_told(tmp_path: Path) -> None:
    with pytest.raises(ds_lena.ConfigError, match="there is no file"):
        page.read(tmp_path / "run.jsonl")


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


def test_the_heat_map_has_a_row_for_each_layer_and_its_columns_stand_where_the_curves_do() -> None:
    """Samples 0, 50 and 200 of 200: the reports meet at 25 and 125, an eighth and five eighths of the width."""
    points = ((1, 1.0, 0), (2, 100.0, 50), (3, None, 200))
    made = page.make([record(update, scale, samples=samples) for update, scale, samples in points], "run")
    image = base64.b64decode(re.findall(r"base64,([^\"]+)", made)[0])
    width, height = (int.from_bytes(image[at : at + 4], "big") for at in (16, 20))
    assert height == 2
    data = image[image.index(b"IDAT") + 4 : image.index(b"IEND") - 8]
    rows = zlib.decompress(data)
    first = [tuple(rows[1 + 3 * i : 4 + 3 * i]) for i in range(width)]
    dark, yellow, grey = page._COLORS[0], page._COLORS[-1], page._NOTHING
    assert first == [dark] * (width // 8) + [yellow] * (width // 2) + [grey] * (width * 3 // 8)
    (batch,) = re.findall(r'class="batch" d="([^"]+)"', made)
    ends = [float(x) for x in re.findall(r"[ML]([\d.]+)", batch)]
    left, wide = map(int, re.findall(r'<image x="(\d+)" width="(\d+)"', made)[0])
    assert (ends[0], ends[-1]) == (left, left + wide)
    assert "b&lt;c&gt;" in made and "b<c>" not in made


def test_nothing_is_fetched_from_elsewhere() -> None:
    made = page.make([record(1), record(2)], "run")
    assert not re.search(r"(src|href)=\"(?!data:)", made)


def test_the_command(tmp_path: Path) -> None:
    """The name of the last layer is half of a character, which no file can hold."""
    last = record(2, samples=16, layers={"\ud800": {"noise_scale": 2.0}})
    path = log(tmp_path, [record(1, samples=8, advice="noise scale 8 micro-batches"), {}, last])
    command = [sys.executable, "-m", "ds_lena.report", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "run.html")
    assert done.stderr == f"ds_lena.report: lines of {path} that are no report, and were left out: 1.\n"
    assert (tmp_path / "run.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["no.jsonl"], "there is no file"),
        (["run.html"], "the page would overwrite the log run.html. Give -o another file"),
        (["link.jsonl", "-o", "run.html"], "the page would overwrite the log link.jsonl"),
        (["run.html", "-o", "no/run.html"], "in a folder that exists"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: list[str],
    message: str,
) -> None:
    path = log(tmp_path, [record(1)], "run.html")
    (tmp_path / "link.jsonl").symlink_to(path)
    before = path.read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ds_lena.report", *given])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("ds_lena.report", run_name="__main__")
    told = capsys.readouterr().err
    assert ended.value.code == 1 and message in told and told.count("\n") == 1
    assert path.read_text() == before


def test_to_python_it_stays_a_function() -> None:
    with pytest.raises(ImportError, match="is a function"):
        __import__("ds_lena.report")
    assert callable(ds_lena.report)
