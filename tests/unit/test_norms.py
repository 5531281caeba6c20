"""Squared norms: as accurate for large tensors as for small ones, without a wide copy."""

import pytest
import torch

from ds_lena import StateError, UnsupportedError
from ds_lena.grad_stats.norms import SquaredNorms, squared_norm, squared_norms

LARGE = 5_000_000


@pytest.fixture(scope="module")
def normal_numbers():
    return torch.randn(LARGE, generator=torch.Generator().manual_seed(0), dtype=torch.float32)


def exact(gradient):
    return gradient.double().square().sum().item()


def largest_allocation(action):
    """Bytes of the largest tensor that torch makes meanwhile."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        action()
    return max(event.self_cpu_memory_usage for event in profile.events())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_large_tensor(normal_numbers, dtype):
    gradient = normal_numbers.to(dtype)
    assert squared_norm(gradient).item() == pytest.approx(exact(gradient), rel=2e-6, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "size", [1, 7, 2047, 2048, 2049, 1 << 16, (1 << 16) + 1, (1 << 18) - 1, (1 << 18) + 1, 3 * (1 << 18) + 2500]
)
def test_every_size_around_the_borders_of_rows_and_blocks(normal_numbers, size, dtype):
    gradient = normal_numbers[:size].to(dtype)
    assert squared_norm(gradient).item() == pytest.approx(exact(gradient), rel=2e-6, abs=0)


def test_a_large_offset_does_not_drown_the_small_numbers(normal_numbers):
    gradient = 1e-3 * normal_numbers
    gradient[0] = 1.0
    assert squared_norm(gradient).item() == pytest.approx(exact(gradient), rel=2e-6, abs=0)


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2)], ids=str)
def test_a_tensor_without_elements_has_norm_zero(shape):
    assert squared_norm(torch.zeros(shape)).item() == 0


def test_a_tensor_of_no_dimensions():
    assert squared_norm(torch.tensor(-3.0)).item() == 9


@pytest.mark.parametrize(
    "view",
    [lambda g: g.t(), lambda g: g[:, ::2], lambda g: g[:, :1].expand(-1, 50)],
    ids=["turned", "strided", "expanded"],
)
def test_a_tensor_that_is_not_contiguous(normal_numbers, view):
    gradient = view(normal_numbers[:90_000].view(300, 300))
    assert not gradient.is_contiguous()
    assert squared_norm(gradient).item() == pytest.approx(exact(gradient), rel=2e-6, abs=0)


@pytest.mark.parametrize("size", [10, 5000])
@pytest.mark.parametrize("value", [1e-18, 1e-6, 1e6, 1e17])
def test_numbers_whose_squares_float32_can_hold(value, size):
    gradient = torch.full((size,), value)
    # Equal numbers are the worst case: within a row all of them are rounded the same way.
    assert squared_norm(gradient).item() == pytest.approx(exact(gradient), rel=1e-5, abs=0)


@pytest.mark.parametrize("size", [10, 5000])
def test_numbers_whose_squares_float32_cannot_hold_give_zero_or_infinity_and_no_wrong_number(size):
    # To the method these are a layer without a gradient, and one whose statistics are not finite.
    assert squared_norm(torch.full((size,), 1e-25)).item() == 0
    assert squared_norm(torch.full((size,), 1e19)).item() == float("inf")


@pytest.mark.parametrize("size", [10, 5000])
@pytest.mark.parametrize("value", [1e-25, 1e19])
def test_float64_gradients_keep_their_range(value, size):
    gradient = torch.full((size,), value, dtype=torch.float64)
    assert squared_norm(gradient).item() == pytest.approx(exact(gradient), rel=1e-12, abs=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("size", [10, 5000])
def test_a_number_that_is_not_finite_is_not_lost(bad, size):
    gradient = torch.ones(size)
    gradient[-1] = bad
    assert not squared_norm(gradient).isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_result_is_float64_whatever_the_gradient_is(dtype):
    result = squared_norm(torch.ones(3, dtype=dtype))
    assert (result.dtype, result.shape) == (torch.float64, ())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1, 7, 1 << 16, (1 << 16) + 1, (1 << 18) + 2049])
def test_norms_that_are_written_one_by_one_and_read_together(normal_numbers, size, dtype):
    gradient = normal_numbers[:size].to(dtype)
    norms = SquaredNorms(3, dtype, torch.device("cpu"))
    norms.write(1, gradient)
    found = norms.read()
    assert found.tolist() == [0, pytest.approx(exact(gradient), rel=2e-6, abs=0), 0]
    assert found.dtype == torch.float64
    norms.clear()
    assert norms.read().tolist() == [0, 0, 0]


def test_gradients_of_several_types_can_be_written_to_the_same_norms():
    norms = SquaredNorms(3, torch.float64, torch.device("cpu"))
    for index, dtype in enumerate((torch.float32, torch.bfloat16, torch.float64)):
        norms.write(index, torch.full((4,), 2.0, dtype=dtype))
    assert norms.read().tolist() == [16, 16, 16]


def test_pieces_replace_what_was_written_before():
    norms = SquaredNorms(3, torch.float32, torch.device("cpu"))
    norms.write(0, torch.ones(5))
    assert squared_norms([(2, torch.ones(2)), (1, torch.full((3,), 2.0))], norms).tolist() == [0, 12, 2]
    assert squared_norms([], norms).tolist() == [0, 0, 0]


def test_gradients_on_several_devices_are_read_together():
    norms = SquaredNorms(2, torch.float32, torch.device("cpu", 0))  # for torch another device than "cpu"
    norms.write(1, torch.ones(3))
    assert norms.read().tolist() == [0, 3]


def test_a_gradient_that_needs_no_graph_leaves_none(normal_numbers):
    norms = SquaredNorms(1, torch.float32, torch.device("cpu"))
    norms.write(0, normal_numbers[:10])
    assert not norms.read().requires_grad


def test_the_gradient_is_left_as_it_is():
    gradient = torch.ones(5000)
    squared_norm(gradient)
    assert torch.equal(gradient, torch.ones(5000))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_wide_copy_of_a_large_tensor_is_made(normal_numbers, dtype):
    gradient = normal_numbers.to(dtype)
    assert largest_allocation(lambda: gradient.double()) >= 8 * LARGE, "this would be one"
    assert largest_allocation(lambda: squared_norm(gradient)) < gradient.nbytes / 4


@pytest.fixture
def batched(monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr("ds_lena.grad_stats.norms.is_batched", lambda tensor: True)


def test_a_gradient_that_changes_while_it_waits_is_refused(batched):
    norms = SquaredNorms(1, torch.float32, torch.device("cpu"))
    norms.refuses_changes = True
    gradient = torch.ones(3)
    norms.collect(0, gradient)
    gradient.mul_(2)
    with pytest.raises(StateError, match="changed in place"):
        norms.read()


def test_tensors_of_several_types_and_none_wait_together(batched, monkeypatch):
    monkeypatch.setattr("ds_lena.grad_stats.norms.MOST_ELEMENTS", 6)
    norms = SquaredNorms(4, torch.float32, torch.device("cpu"))
    for index, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
        norms.collect(index, torch.full((4,), 2.0, dtype=dtype))
    norms.collect(3, torch.ones(0))
    assert norms.read().tolist() == [16, 16, 16, 0]
    norms.clear()
    assert norms.read().tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("method", ["write", "collect"])
def test_a_sparse_gradient_is_refused(method):
    norms = SquaredNorms(1, torch.float32, torch.device("cpu"))
    with pytest.raises(UnsupportedError, match="sparse=False"):
        getattr(norms, method)(0, torch.ones(3, 3).to_sparse())


def test_a_gradient_that_may_change_or_is_large_does_not_wait(batched, monkeypatch):
    monkeypatch.setattr("ds_lena.grad_stats.norms.MOST_ELEMENTS", 6)
    norms = SquaredNorms(2, torch.float32, torch.device("cpu"))
    for index, (elements, up_to) in enumerate([(4, 3), (7, 100)]):
        gradient = torch.full((elements,), 2.0)
        norms.collect(index, gradient, up_to)
        gradient.zero_()
    assert norms.read().tolist() == [16, 28]


def test_a_norm_is_taken_where_its_tensor_is():
    """As with offload: gradients on the CPU, the result on the model's device. Meta stands for that device."""
    norms = SquaredNorms(2, torch.float32, torch.device("cpu"))
    norms.write(0, torch.ones(3))
    norms.write(1, torch.ones(5, device="meta"))
    assert {device.type for device in norms._buffers} == {"cpu", "meta"}
    elsewhere = SquaredNorms(2, torch.float32, torch.device("meta"))
    elsewhere.write(0, torch.ones(3))
    assert elsewhere._buffers[torch.device("cpu")][0].tolist() == [3, 0]
    assert elsewhere.read().device.type == "meta"
