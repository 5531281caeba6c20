"""With one layer and no warm-up the gain is AdaScale's (Johnson et al., ICML 2020), as fairscale implements it.

fairscale replaces a negative signal by 0 before it averages, we after, so the runs here have a strong signal.
"""

import pytest
import torch
import torch.nn.functional as F
from fairscale.optim import AdaScale
from torch import nn

import ds_lena

UPDATES, N = 25, 8


def regression(seed=0):
    """A model, and micro-batches [update][micro] whose gradient is mostly signal."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(UPDATES, N, 16, 6, generator=generator, dtype=torch.float64)
    y = 5 + 0.2 * torch.randn(UPDATES, N, 16, 3, generator=generator, dtype=torch.float64)
    return model, list(zip(x, y, strict=True))


def run(make_optimizer, gain):
    """Gains of all updates and the trained weights."""
    model, windows = regression()
    optimizer, gains = make_optimizer(model), []
    for xs, ys in windows:
        optimizer.zero_grad()
        for x, y in zip(xs, ys, strict=True):
            (F.mse_loss(model(x), y) / N).backward()
        optimizer.step()
        gains.append(gain(optimizer))
    return torch.tensor(gains), torch.cat([p.detach().flatten() for p in model.parameters()])


SGD = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.01}


@pytest.mark.parametrize("smoothing", [None, 0.0, 0.9])
@pytest.mark.parametrize("k", [1, 2])
def test_one_layer_without_warm_up_is_adascale(k, smoothing):
    def adascale(model):
        options = {"scale": N / k, "smoothing": smoothing, "num_gradients_to_accumulate": N}
        return AdaScale(torch.optim.SGD(model.parameters(), **SGD), world_size=1, **options)

    def lena(model):
        keys = {"layer": "model", "warmup": "none", "smoothing": smoothing, "base_batch_size": 16 * k}
        return ds_lena.LENA(model.parameters(), base="sgd", micro_batch_size=16, **keys, **SGD)

    their_gains, their_weights = run(adascale, lambda optimizer: optimizer.gain())
    our_gains, our_weights = run(lena, lambda optimizer: ds_lena.report(optimizer)["gain"])
    assert 1.05 < their_gains.max() < 0.9 * N / k, "a gain between the bounds, so that there is something to compare"
    # fairscale adds up the squared norms in float32.
    torch.testing.assert_close(our_gains, their_gains, rtol=1e-5, atol=0)
    torch.testing.assert_close(our_weights, their_weights, rtol=1e-5, atol=1e-7)
