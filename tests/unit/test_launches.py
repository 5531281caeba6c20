"""On a GPU an update is a few launches, whatever the number of tensors, and what is recorded is what is computed."""

import pytest
import torch

from ds_lena import LENA, report
from ds_lena.grad_stats import norms
from ds_lena.optimizer import controller_of
from ds_lena.recorded import Recorded
from tests.helpers import launches
from tests.helpers.launches import Chain, Launches, as_on_a_gpu


def train(updates=5, tensors=4, counted=None, skipped=(), **keys):
    """Train and return the weights and the reports. `counted`: gets what each update launches, by phase."""
    model = Chain(tensors)
    optimizer = LENA(model.named_parameters(), lr=0.05, total_steps=10, **keys)
    generator = torch.Generator().manual_seed(1)
    reports = []
    for update in range(updates):
        optimizer.zero_grad()
        passes = []
        for _ in range(2):
            loss = model(torch.randn(5, 3, generator=generator)).square().mean()
            with Launches() as in_pass:
                loss.backward()
            passes.append(in_pass)
        controller = controller_of(optimizer)
        with Launches() as in_step:
            controller.begin_update(optimizer.param_groups, optimizer.state)
            if update not in skipped:
                controller.apply(optimizer.param_groups, optimizer.state)
            controller.end_update(applied=update not in skipped)
        if counted is not None:
            counted.append((passes[-1], in_step))
        reports.append(report(optimizer))
    return [p.detach().clone() for p in model.parameters()], reports


@pytest.mark.parametrize(("base", "most"), [("adamw", 12), ("sgd", 12), ("lars", 20), ("lamb", 20)])
def test_the_number_of_launches_does_not_depend_on_the_number_of_tensors(monkeypatch, base, most):
    as_on_a_gpu(monkeypatch, with_kernels=True)
    few, many = [], []
    train(tensors=3, counted=few, base=base)
    train(tensors=40, counted=many, base=base)
    counts = [updates[-1][1].counts for updates in (few, many)]
    for found in counts:
        found.pop("lift_fresh", None)  # the addresses of gradients, which are sent when they have changed
    assert counts[0] == counts[1]
    assert many[-1][1].total <= most, many[-1][1].counts


KEYS = [{}, {"base": "lamb"}, {"variant": "authors-code"}, {"warmup": "none", "layer": "model"},
        {"scaling": "sqrt", "warmup": "fixed"}]  # fmt: skip


@pytest.mark.parametrize("keys", KEYS, ids=str)
def test_what_is_recorded_is_what_is_computed(monkeypatch, keys):
    expected = train(updates=7, skipped=(2, 3), **keys)
    with monkeypatch.context() as patch:
        patch.setattr("ds_lena.recorded.can_record", lambda tensors: True)
        patch.setattr("ds_lena.recorded.capture", launches.capture)
        recorded = train(updates=7, skipped=(2, 3), **keys)
    assert recorded[1] == expected[1]
    assert all(torch.equal(one, other) for one, other in zip(recorded[0], expected[0], strict=True))


def test_norms_in_batches_are_those_taken_one_by_one(monkeypatch):
    weights, reports = train(tensors=9)
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(norms, "MOST_ELEMENTS", 20)
    batched, reports_of_batches = train(tensors=9)
    for one, other in zip(batched, weights, strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(reports_of_batches, reports, strict=True):
        assert one["layers"].keys() == other["layers"].keys()


def test_recordings_do_not_grow_with_the_number_of_passes(monkeypatch):
    as_on_a_gpu(monkeypatch)
    model = Chain(2)
    optimizer = LENA(model.named_parameters(), lr=0.05, total_steps=100)
    for passes in range(1, 40):
        optimizer.zero_grad()
        for _ in range(passes):
            model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    controller = controller_of(optimizer)
    used = controller.meter._statistics._own, controller._recorded_decision, controller.meter._mean_norms._take_squares
    assert all(1 <= len(recorded._recordings) <= 6 for recorded in used)


def test_a_function_whose_key_always_changes_is_called_as_it_is(monkeypatch, caplog):
    as_on_a_gpu(monkeypatch)
    recorded, three = Recorded(), torch.tensor(3.0)
    for key in range(100):
        assert float(recorded(lambda key, tensor: tensor * key, key, three)) == 3 * key
    assert not recorded._recordings
    assert caplog.text.count("no longer one CUDA graph") == 1


def test_a_result_that_is_an_input_is_not_overwritten(monkeypatch):
    as_on_a_gpu(monkeypatch)
    recorded, tensor = Recorded(), torch.tensor(1.0)
    for power in range(1, 9):
        before, tensor = tensor, recorded(lambda _, tensor: 2 * tensor, None, tensor)
        assert (float(before), float(tensor)) == (2 ** (power - 1), 2**power)


@pytest.mark.parametrize(("bound", "most"), [("MOST_ELEMENTS", 35), ("MOST_TENSORS", 4)])
def test_tensors_that_wait_are_bounded(monkeypatch, bound, most):
    """Beside the one that comes last."""
    as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(norms, bound, most)
    squares = norms.SquaredNorms(50, torch.float32, torch.device("cpu"))
    held = []
    for index in range(50):
        squares.collect(index, torch.ones(10))
        held.append(sum(tensor.numel() for batch in squares._waiting.values() for _, tensor, _ in batch))
    assert 30 <= max(held) <= 35
