"""The experiment with statistics of scaled gradients goes through the measurement's own seams."""

import pytest
import torch

import ds_lena
from ds_lena import LENA
from examples.compare.preconditioned import precondition
from tests.unit.support import random_gradients, train_window, weights

BETA2, EPS = 0.9, 1e-8


def test_local_and_averaged_gradients_are_scaled_alike():
    (weight,) = parameters = weights(4)
    lena = LENA(parameters, warmup="none", smoothing=0.0, betas=(0.9, BETA2))
    precondition(lena, BETA2, EPS)
    for seed in range(8):
        gradients = random_gradients(parameters, n=3, seed=seed)
        step, second = (float(lena.state[weight]["step"]), lena.state[weight]["exp_avg_sq"].clone()) if seed else (0, 0)
        train_window(lena, parameters, gradients)
        scale = 1.0 if step < 5 else 1 / ((second / (1 - BETA2**step)).sqrt() + EPS)
        g = torch.stack([gradient for (gradient,) in gradients]) * scale
        a, b = g.square().sum(1).mean(), g.mean(0).square().sum()
        layer = ds_lena.report(lena)["layers"]["param_0"]
        assert layer["noise"] == pytest.approx((3 / 2 * (a - b)).item())
        assert layer["signal"] == pytest.approx((b - layer["noise"] / 3).item())
