"""`ds_lena.watch` in plain PyTorch in one process, what it says, and the uncertainty that it gives."""

from __future__ import annotations

import gc
import json
import logging
import math
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ds_lena
from ds_lena.advice import interval
from ds_lena.grad_stats.measurement import Measurement
from ds_lena.schedule.noise import Tally


class Line(nn.Module):
    """Its gradient is the mean of the samples, wherever the weights are."""

    def __init__(self, size: int = 2000) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, updates: int, micros: int, mean: float = 0.25) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(updates):
        for _ in range(micros):
            (model(mean + torch.randn(2, model.weight.numel(), generator=generator)) / micros).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()


def watched(
    micros: int, updates: int = 80, mean: float = 0.25, size: int = 2000, **keys: object
) -> tuple[ds_lena.noise.Watch, dict[str, object]]:
    model = Line(size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watch = ds_lena.watch(model, optimizer, micro_batch_size=2, **keys)
    train(model, optimizer, updates, micros, mean)
    return watch, watch.report()


@pytest.mark.parametrize("micros", [2, 4, 16])
def test_a_known_noise_scale_is_found_within_2_percent(micros: int) -> None:
    """Variance 1 and mean 1/4 in each place: with 2 samples the noise scale is 8. Clipping changes nothing of it."""
    _, report = watched(micros, updates=960 // micros)
    assert report["noise_scale"] == pytest.approx(8, rel=0.02)
    assert report["noise_scale_samples"] == 2 * report["noise_scale"]
    assert report["noise_scale_low"] < 8 < report["noise_scale_high"]
    assert (report["n"], report["estimator"]) == (micros, "micro-batches")
    assert report["samples"] == 2 * 960


def test_one_micro_batch_tells_nothing_and_it_says_so() -> None:
    _, report = watched(1, updates=3)
    assert report["estimator"] is None
    assert "two micro-batches" in report["advice"]


def test_differences_of_two_gradients_tell_it_and_are_marked() -> None:
    _, report = watched(1, updates=1000, differences=True)
    assert report["noise_scale"] == pytest.approx(8, rel=0.02)
    assert report["estimator"] == "differences" and "from differences" in report["advice"]
    assert (report["n"], report["micro_batches"], report["update"]) == (1, 1000, 1000)


def test_differences_are_those_of_their_definition() -> None:
    """Two gradients g and h: noise |g - h|^2 / 2, signal g h. One update of two micro-batches is between others."""
    model = Line(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = ds_lena.watch(model, optimizer, differences=True, smoothing=0.0)
    g, h = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 5.0])
    for gradients in ([g], [h]):
        for gradient in gradients:
            (model.weight @ gradient).backward()
        optimizer.step()
        optimizer.zero_grad()
    report = watch.report()
    assert report["noise"] == pytest.approx(float((g - h).square().sum() / 2))
    assert report["signal"] == pytest.approx(float(g @ h))
    for gradient in (g, h):
        (model.weight @ gradient / 2).backward()
    optimizer.step()
    optimizer.zero_grad()
    assert watch.report()["n"] == 2
    (model.weight @ g).backward()
    optimizer.step()
    assert watch.report()["update"] == 4  # there is no gradient of one micro-batch to compare with


def test_the_weights_do_not_know_of_it() -> None:
    found = []
    for is_watched in (True, False):
        model = Line(30)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if is_watched:
            ds_lena.watch(model, optimizer, differences=True)
        train(model, optimizer, 5, 2)
        train(model, optimizer, 5, 1)
        found.append(model.weight.detach().clone())
    assert torch.equal(*found)


def test_a_lena_measures_for_itself() -> None:
    model = Line(30)
    optimizer = ds_lena.LENA(model.named_parameters(), warmup="none", micro_batch_size=2)
    watch = ds_lena.watch(model, optimizer, tokens_per_sample=8)
    train(model, optimizer, 3, 4)
    mine, its = watch.report(), ds_lena.report(optimizer)
    assert mine["noise_scale"] == its["noise_scale"]
    assert mine["noise_scale_tokens"] == 16 * mine["noise_scale"]
    assert "gain" in its and "factor" in its["layers"]["weight"], "the report of the LENA stays that of the LENA"


def test_state_goes_on_where_it_was() -> None:
    watch, report = watched(4, updates=5, size=30)
    saved = json.loads(json.dumps(watch.state_dict()))
    other, _ = watched(4, updates=0, size=30)
    other.load_state_dict(saved)
    assert other.report() == report


@pytest.mark.parametrize("of", [str, Path])
def test_the_log_has_a_line_every_so_many_updates(tmp_path: Path, of: type) -> None:
    watch, _ = watched(4, updates=6, size=30, log=of(tmp_path / "runs" / "log.jsonl"), log_every=3)
    assert isinstance(watch.config.log, str)
    lines = [json.loads(line) for line in (tmp_path / "runs" / "log.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [3, 6]
    assert lines[1]["layers"]["weight"].keys() == {"noise", "signal", "noise_scale"}


def test_a_log_goes_on_after_a_line_that_was_torn(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"update": 1, "noi')
    watched(4, updates=2, size=30, log=str(log), log_every=1)
    torn, *lines = log.read_text().splitlines()
    assert torn == '{"update": 1, "noi' and [json.loads(line)["update"] for line in lines] == [1, 2]


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, report = watched(4, updates=3, size=30, log=str(tmp_path), log_every=1)
    assert report["update"] == 3
    assert [r.getMessage().split(":")[1] for r in caplog.records if r.levelname == "WARNING"] == [
        ' cannot write to "log"'
    ]


def test_without_keys_it_is_the_watch_that_is_there() -> None:
    model = Line(30)
    optimizer = torch.optim.AdamW(model.parameters())
    watch = ds_lena.watch(model, optimizer, smoothing=0.5)
    assert ds_lena.watch(model, optimizer) is watch
    for keys in ({"smoothing": 0.6}, {"smoothing": None}):
        with pytest.raises(ds_lena.ConfigError, match="watched already"):
            ds_lena.watch(model, optimizer, **keys)


@pytest.mark.parametrize(
    "keys",
    [{"layer": "model"}, {"smoothing": 0.5}, {"exclude": ["*"]}, {"differences": True}, {"micro_batch_size": 4}],
    ids=str,
)
def test_lena_measures_by_its_own_keys(keys: dict[str, object]) -> None:
    model = Line(30)
    optimizer = ds_lena.LENA(model.named_parameters(), warmup="none", smoothing=0.9)
    with pytest.raises(ds_lena.ConfigError, match="LENA measures here, with"):
        ds_lena.watch(model, optimizer, **keys)
    assert ds_lena.watch(model, optimizer, smoothing=0.9) is ds_lena.watch(model, optimizer)


def test_what_is_no_state_of_a_watch_is_told() -> None:
    watch, _ = watched(4, updates=1, size=30)
    before = watch.report()
    with pytest.raises(ds_lena.StateError, match='has no "differences"'):
        watch.load_state_dict({})
    assert watch.report() == before


def test_a_closed_watch_sees_nothing_and_training_goes_on() -> None:
    model = Line(30)
    optimizer = torch.optim.AdamW(model.parameters())
    watch = ds_lena.watch(model, optimizer)
    train(model, optimizer, 2, 2)
    watch.close()
    train(model, optimizer, 2, 2)
    assert watch.report()["update"] == 2


def test_a_dropped_model_is_freed() -> None:
    model = Line(30)
    optimizer = torch.optim.AdamW(model.parameters())
    ds_lena.watch(model, optimizer)
    train(model, optimizer, 1, 2)
    gone = weakref.ref(model.weight)
    del model, optimizer
    gc.collect()
    assert gone() is None


def test_a_layer_without_gradient_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    """Its micro-gradients cancel each other exactly, as if the average had been lost on the way."""
    model = nn.ParameterDict({"kept": nn.Parameter(torch.ones(2)), "lost": nn.Parameter(torch.ones(2))})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = ds_lena.watch(model, optimizer)
    for _ in range(4):
        for sign in (1, -1):
            (model["kept"].sum() + sign * model["lost"].sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    watch.report()
    (told,) = [record.getMessage() for record in caplog.records if "no gradient arrives" in record.getMessage()]
    assert '"lost"' in told and '"kept"' not in told


# -- advice -----------------------------------------------------------------------------------------------------------


def tally_of(pairs: Tensor, smoothing: float) -> Tally:
    """Of updates with these noises and signals, (updates, 2)."""
    tally, n = Tally.start(torch.device("cpu")), torch.tensor(4.0, dtype=torch.float64)
    for s, m in pairs.double():
        b = m + s / n
        measured = Measurement(n, (s + m).reshape(1), b.reshape(1))
        tally = tally.after(measured, smoothing, None, None)
    return tally


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    holds = []
    for _ in range(100):
        noise = 8 + torch.randn(60, generator=generator)
        signal = 1 + 1.0 * torch.randn(60, generator=generator)
        low, high = interval(tally_of(torch.stack((noise, signal), 1), 0.95))
        holds.append(low < 8 < high)
    assert 0.88 <= sum(holds) / len(holds) <= 0.99


def test_a_signal_that_cannot_be_told_from_0_has_no_upper_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = torch.stack((8 + torch.randn(40, generator=generator), 3 * torch.randn(40, generator=generator)), 1)
    low, high = interval(tally_of(pairs, 0.95))
    assert math.isinf(high) and 0 < low < 40


def test_a_larger_micro_batch_has_less_noise_and_the_same_samples() -> None:
    """Noise 8 at 2 samples is noise 4 at 4 samples: the averages are those of the present size, with no spread."""
    n, tally = torch.tensor(4.0, dtype=torch.float64), Tally.start(torch.device("cpu"))
    for noise, size, before in ((8.0, 2, None), (8.0, 2, 2), (4.0, 4, 2), (4.0, 4, 4)):
        measured = Measurement(n, torch.tensor([noise + 1.0]).double(), torch.tensor([1 + noise / 4]).double())
        tally = tally.after(measured, 0.5, size, before)
    assert interval(tally) == (pytest.approx(4), pytest.approx(4))
    assert (tally.micro_batches, tally.samples) == (16, 4 * (2 + 2 + 4 + 4))


def test_a_checkpoint_of_before_has_no_tally_and_loads() -> None:
    model = Line(30)
    optimizer = ds_lena.LENA(model.named_parameters(), warmup="none")
    train(model, optimizer, 3, 4)
    saved = optimizer.state_dict()
    del saved["lena"]["tally"]
    other = ds_lena.LENA(model.named_parameters(), warmup="none")
    other.load_state_dict(saved)
    assert ds_lena.report(other) == ds_lena.report(optimizer)
    assert ds_lena.watch(model, other).report()["micro_batches"] == 0


@pytest.mark.parametrize("updates", [0, 1])
def test_before_the_second_update_anything_may_be(updates: int) -> None:
    assert interval(tally_of(torch.ones(updates, 2), 0.95)) == (0.0, math.inf)


def test_the_sentence_of_a_worked_example() -> None:
    """Noise 38, signal 1, n = 32: worth (38 + 1) / (38 / 32 + 1) = 17.8 single updates, which is 0.56 of 32."""
    model = Line(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    watch = ds_lena.watch(model, optimizer, micro_batch_size=4, tokens_per_sample=512, smoothing=0.0)
    side = math.sqrt(38 * 31 / 32)
    for micro in range(32):
        gradient = torch.tensor([1.0, side if micro % 2 else -side]) / 32
        gradient[0] = math.sqrt(1 + 38 / 32) / 32  # so that the signal is 1 after its correction
        (model.weight @ gradient).backward()
    optimizer.step()
    report = watch.report()
    assert report["noise"] == pytest.approx(38) and report["signal"] == pytest.approx(1, rel=1e-4)
    assert report["advice"] == (
        "noise scale 38 micro-batches (152 samples, 77,824 tokens), between 0 and infinity; at your 32 an update is "
        "worth 17.8 single ones: efficiency 0.56"
    )


def test_a_signal_that_is_not_positive_is_an_infinite_noise_scale_and_said() -> None:
    """Gradients 2 and -1: the mean is 1/2, B = 1/4, the noise 9/2, the signal 1/4 - 9/4 = -2."""
    model = Line(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = ds_lena.watch(model, optimizer, smoothing=0.0)
    for gradient in (2.0, -1.0):
        (model.weight.sum() * gradient / 2).backward()
    optimizer.step()
    report = watch.report()
    assert (report["noise"], report["signal"]) == (pytest.approx(4.5), pytest.approx(-2))
    assert math.isinf(report["noise_scale"]) and "all noise" in report["advice"]
    assert report["efficiency"] == 1.0, "an update is worth as many as it has micro-batches"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"layers": "block"}, 'Did you mean "layer"?'),
        ({"layer": "row"}, "\"layer\": 'row' is not allowed"),
        ({"smoothing": 1.0}, '"smoothing"'),
        ({"tokens_per_sample": 0}, '"tokens_per_sample": 0'),
        ({"tokens_per_sample": math.inf}, "a finite number > 0"),
        ({"tokens_per_sample": 10**400}, "a finite number > 0"),
        ({"log_every": 0}, '"log_every": 0'),
        ({"differences": "yes"}, "true or false"),
        ({"log": 3}, "the path of a file"),
    ],
)
def test_a_wrong_key_is_refused(keys: dict[str, object], message: str) -> None:
    model = Line(3)
    with pytest.raises(ds_lena.ConfigError, match="ds_lena") as caught:
        ds_lena.watch(model, torch.optim.SGD(model.parameters()), **keys)
    assert message in str(caught.value)


def test_what_cannot_be_watched_is_refused() -> None:
    model = Line(3)
    with pytest.raises(ds_lena.ConfigError, match=r"watch\(model, optimizer\)"):
        ds_lena.watch(model)
    optimizer = torch.optim.SGD(model.parameters())
    ds_lena.watch(model, optimizer)
    with pytest.raises(ds_lena.UnsupportedError, match="closure"):
        optimizer.step(lambda: 0.0)


@pytest.fixture(autouse=True)
def warnings_are_seen(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ds_lena")
