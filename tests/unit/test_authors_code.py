"""`"variant": "authors-code"` gives what the published code gave: its own numbers, in float64, are in golden/.

`functions`: random statistics of four layers through the authors' functions, for n = 2, 8 and 64. `trajectory`: 30
updates of a small CNN on two workers with four micro-batches each (here: eight on one). w0 is without warm-up, w2 with
the warm-up by layer.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ds_lena
from ds_lena.grad_stats.measurement import Measurement
from ds_lena.optimizer import controller_of
from ds_lena.schedule import authors_code
from ds_lena.schedule.algorithm import Clock, LayerState, step_factor
from tests.unit.support import config, measure, scalar

GOLDEN = Path(__file__).parent / "golden"
CLOSE = {"rtol": 1e-9, "atol": 1e-15}
SIZES = (6, 2, 4, 1)
WARMUP = {"w0": "none", "w2": "layer"}


def load(name):
    with np.load(GOLDEN / f"lena_{name}_float64.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays}


FUNCTIONS, TRAJECTORY, DATA = load("functions"), load("trajectory"), load("data")


def ratio(a, b):
    """The authors' scaling factor, before it is bounded by n."""
    return (a + 1e-6) / (b + 1e-6)


@pytest.mark.parametrize("warmup", WARMUP)
@pytest.mark.parametrize("n", [2, 8, 64])
def test_the_functions_of_the_authors(n, warmup):
    golden = {
        key: FUNCTIONS[f"S{n}/LENA/{warmup}/{key}"] for key in ("scaling_factor", "warmup_progress", "lr", "grad_var")
    }
    squares, means = FUNCTIONS[f"S{n}/square_sum_grads"], FUNCTIONS[f"S{n}/mean_grads"]
    keys = config(variant="authors-code", warmup=WARMUP[warmup])
    clock = Clock(done=scalar(0), planned=scalar(4 * n / keys.warmup_fraction))  # so that theta is 4 n
    state = LayerState.start(len(SIZES), warmup=1.0)
    for t in range(len(squares)):
        square_of_mean = torch.stack([g.square().sum() for g in means[t].split(SIZES)])
        state = authors_code.advance(state, Measurement(scalar(n), squares[t] / n, square_of_mean), clock, keys)
        a, b = state.averages
        torch.testing.assert_close(ratio(a, b), golden["scaling_factor"][t], **CLOSE)
        torch.testing.assert_close(ratio(a.sum(), b.sum()), golden["grad_var"][t], **CLOSE)
        torch.testing.assert_close(state.gain, ratio(a, b).clamp(max=n), **CLOSE)
        torch.testing.assert_close(0.1 * 0.01 ** (t / 20) * step_factor(state, keys), golden["lr"][t], **CLOSE)
        if warmup == "w2":
            torch.testing.assert_close(state.progress, golden["warmup_progress"][t], **CLOSE)


def cnn():
    conv, bn, fc1, fc2 = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(64, 8), nn.Linear(8, 5)
    named = nn.ModuleDict({"conv": conv, "bn": bn, "fc1": fc1, "fc2": fc2}).double()
    with torch.no_grad():
        for name, parameter in named.named_parameters():
            parameter.copy_(DATA[f"init/{name}"])
    return named, nn.Sequential(conv, bn, nn.ReLU(), nn.Flatten(), fc1, nn.ReLU(), fc2)


@pytest.mark.parametrize("warmup", WARMUP)
def test_a_training_run_of_the_authors(warmup):
    golden = {key.removeprefix(f"LENA/{warmup}/2x4/"): value for key, value in TRAJECTORY.items()}
    named, model = cnn()
    # theta = total_steps x n x warmup_fraction = 100 x 8 x 0.05 = 40
    optimizer = ds_lena.LENA(
        named.named_parameters(), base="sgd", lr=0.05, momentum=0.9, weight_decay=5e-4, variant="authors-code",
        warmup=WARMUP[warmup], total_steps=100, warmup_fraction=0.05,
    )  # fmt: skip
    for t in range(30):
        optimizer.param_groups[0]["lr"] = lr = 0.05 * 0.01 ** (t / 30)
        optimizer.zero_grad()
        losses = [F.cross_entropy(model(DATA["x"][i]), DATA["y"][i]) for i in range(8 * t, 8 * t + 8)]
        for loss in losses:
            (loss / 8).backward()
        optimizer.step()

        layers = ds_lena.report(optimizer)["layers"].values()
        flat = torch.cat([p.detach().flatten() for p in named.parameters()])
        a, b = controller_of(optimizer).schedule.state.averages
        torch.testing.assert_close(torch.stack(losses).mean().detach(), golden["loss"][t], **CLOSE)
        torch.testing.assert_close(flat, golden["params"][t], **CLOSE)
        torch.testing.assert_close(ratio(a, b), golden["scaling_factor"][t], **CLOSE)
        torch.testing.assert_close(ratio(a.sum(), b.sum()), golden["grad_var"][t], **CLOSE)
        torch.testing.assert_close(
            lr * torch.tensor([layer["factor"] for layer in layers], dtype=torch.float64), golden["lr"][t], **CLOSE
        )
        if warmup == "w2":
            state = torch.tensor([layer["state"] for layer in layers], dtype=torch.float64)
            torch.testing.assert_close(state, golden["warmup_progress"][t], **CLOSE)


def test_the_first_update_of_the_warm_up_does_nothing():
    keys = config(variant="authors-code", total_steps=10)
    clock = Clock(done=scalar(2), planned=scalar(20))
    state = authors_code.advance(LayerState.start(1, warmup=0.0), measure([[3, 0], [1, 0]]), clock, keys)
    assert step_factor(state, keys).item() == 0
    assert state.progress.item() > 0


def test_a_layer_at_the_bound_counts_the_gain_of_the_model():
    keys = config(variant="authors-code", warmup="none")
    # n = 2: one layer of orthogonal micro-gradients and opposite ones beyond them, and a quiet layer.
    measured = measure([[1e3, 0], [-1e3, 0]], [[1e3, 0], [1e3, 0]])
    clock = Clock(done=scalar(2), planned=scalar(20))
    state = authors_code.advance(LayerState.start(2, warmup=1.0), measured, clock, keys)
    assert state.gain.tolist() == pytest.approx([2, 1])
    assert state.progress.tolist() == pytest.approx([2, 1])  # the model's ratio is (1e6 + 1e6) / (0 + 1e6)


def test_a_non_finite_layer_is_left_alone():
    keys = config(variant="authors-code", warmup="none")
    clock = Clock(done=scalar(2), planned=scalar(20))
    good, bad = measure([[3, 0], [1, 0]], [[3, 0], [1, 0]]), measure([[3, 0], [1, 0]], [[float("nan"), 0], [1, 0]])
    before = authors_code.advance(LayerState.start(2, warmup=1.0), good, clock, keys)
    after = authors_code.advance(before, bad, clock, keys)
    assert torch.equal(after.averages[:, 1], before.averages[:, 1])
    assert after.progress[1] == before.progress[1]
    assert torch.isfinite(after.averages).all()
