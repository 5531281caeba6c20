"""The kernels. One program moves one chunk: neighbouring elements of one tensor with one learning rate.

This is the only file that imports Triton. The kernels compute in float32, in the order of torch's fused kernels.

`table` (chunks, 4) int64: see `table.py`. `pointers` (tensors, COLUMNS) int64: addresses of a tensor's data, by column.
The first is the parameter, the second its gradient, then come the rule's buffers, and last its count of updates. An
address is 0 where there is none. Nothing moves without a parameter or a gradient. `rates`: learning rates, float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""The types that the kernels read and write."""


@triton.jit
def _chunk(table, pointers, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Of this program: its tensor's row of addresses, its elements, which of them there are, and how they move."""
    row = table + 4 * tl.program_id(0).to(tl.int64)
    addresses = pointers + COLUMNS * tl.load(row)
    elements = tl.load(row + 1) + tl.arange(0, BLOCK)
    mask = (elements < tl.load(row + 2)) & (tl.load(addresses) != 0)
    return addresses, elements, mask, tl.load(row + 3)


@triton.jit
def _load(addresses, column, elements, mask, TYPE: tl.constexpr):
    data = tl.load(addresses + column).to(tl.pointer_type(TYPE))
    return tl.load(data + elements, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(addresses, column, elements, mask, values, TYPE: tl.constexpr):
    data = tl.load(addresses + column).to(tl.pointer_type(TYPE))
    tl.store(data + elements, values.to(TYPE), mask=mask)


@triton.jit
def _count(addresses, column):
    """The tensor's count of updates. A tensor without gradient may have none."""
    data = tl.load(addresses + column)
    return tl.load(data.to(tl.pointer_type(tl.float32)), mask=data != 0, other=1.0)


@triton.jit
def _plus_decay(vector, weight, how, weight_decay):
    """`vector` + `weight_decay` `weight`, where the chunk has weight decay."""
    return tl.where((how % 2 == 1) & (weight_decay != 0.0), vector + weight_decay * weight, vector)


@triton.jit
def _correction(log_beta, count):
    """1 - beta^count. In float32 it would have four digits."""
    return 1.0 - tl.exp(count.to(tl.float64) * log_beta)


@triton.jit
def adamw(
    table, pointers, rates, weight_decay, beta1, beta2, rest1, rest2, log_beta1, log_beta2, eps,
    WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, BUFFER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """See `rules/adamw.py`."""
    at, elements, mask, how = _chunk(table, pointers, 5, BLOCK)
    mask = mask & (tl.load(at + 1) != 0)
    rate = tl.load(rates + how // 2)
    count = _count(at, 4)
    weight = _load(at, 0, elements, mask, WEIGHT)
    gradient = _load(at, 1, elements, mask, GRADIENT)
    exp_avg = _load(at, 2, elements, mask, BUFFER)
    exp_avg_sq = _load(at, 3, elements, mask, BUFFER)
    weight = _plus_decay(weight, weight, how, -rate * weight_decay)
    exp_avg = beta1 * exp_avg + rest1 * gradient
    exp_avg_sq = beta2 * exp_avg_sq + rest2 * gradient * gradient
    size = tl.div_rn(rate, _correction(log_beta1, count).to(tl.float32))
    root = tl.sqrt_rn(_correction(log_beta2, count).to(tl.float32))
    weight -= tl.div_rn(size * exp_avg, tl.div_rn(tl.sqrt_rn(exp_avg_sq), root) + eps)
    _store(at, 0, elements, mask, weight, WEIGHT)
    _store(at, 2, elements, mask, exp_avg, BUFFER)
    _store(at, 3, elements, mask, exp_avg_sq, BUFFER)


@triton.jit
def sgd(
    table, pointers, rates, weight_decay, momentum,
    HAS_MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
    WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, BUFFER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """See `rules/sgd.py`."""
    at, elements, mask, how = _chunk(table, pointers, 4 if HAS_MOMENTUM else 3, BLOCK)
    mask = mask & (tl.load(at + 1) != 0)
    rate = tl.load(rates + how // 2)
    weight = _load(at, 0, elements, mask, WEIGHT)
    direction = _plus_decay(_load(at, 1, elements, mask, GRADIENT), weight, how, weight_decay)
    if HAS_MOMENTUM:
        velocity = momentum * _load(at, 2, elements, mask, BUFFER) + direction
        _store(at, 2, elements, mask, velocity, BUFFER)
        direction = direction + momentum * velocity if NESTEROV else velocity
    _store(at, 0, elements, mask, weight - rate * direction, WEIGHT)


@triton.jit
def lars(
    table, pointers, rates, weight_decay, momentum,
    HAS_MOMENTUM: tl.constexpr,
    WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, BUFFER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """See `rules/lars.py`."""
    at, elements, mask, how = _chunk(table, pointers, 4 if HAS_MOMENTUM else 3, BLOCK)
    mask = mask & (tl.load(at + 1) != 0)
    rate = tl.load(rates + how // 2)
    weight = _load(at, 0, elements, mask, WEIGHT)
    velocity = _plus_decay(rate * _load(at, 1, elements, mask, GRADIENT), weight, how, rate * weight_decay)
    if HAS_MOMENTUM:
        velocity += momentum * _load(at, 2, elements, mask, BUFFER)
        _store(at, 2, elements, mask, velocity, BUFFER)
    _store(at, 0, elements, mask, weight - velocity, WEIGHT)


@triton.jit
def _store_squares(addresses, squares, weight, other):
    """Write the squared norms of one chunk of a parameter."""
    at, is_there = squares + 2 * tl.program_id(0).to(tl.int64), tl.load(addresses) != 0
    tl.store(at, tl.sum(weight * weight), mask=is_there)
    tl.store(at + 1, tl.sum(other * other), mask=is_there)


@triton.jit
def lamb_norms(
    table, pointers, squares, clip, weight_decay, beta1, beta2, rest1, rest2, log_beta1, log_beta2, eps,
    HAS_CLIP: tl.constexpr,
    WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, BUFFER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Squared norms of the weights and of LAMB's update, (chunks, 2) float64: see `rules/lamb.py`. Moves nothing."""
    at, elements, mask, how = _chunk(table, pointers, 5, BLOCK)
    has_gradient = mask & (tl.load(at + 1) != 0)
    count = _count(at, 4) + 1.0
    weight = _load(at, 0, elements, mask, WEIGHT)
    gradient = _load(at, 1, elements, has_gradient, GRADIENT)
    if HAS_CLIP:
        gradient *= tl.load(clip).to(tl.float32)
    exp_avg = beta1 * _load(at, 2, elements, mask, BUFFER) + rest1 * gradient
    exp_avg_sq = beta2 * _load(at, 3, elements, mask, BUFFER) + rest2 * gradient * gradient
    size = 1.0 / _correction(log_beta1, count).to(tl.float32)
    root = tl.sqrt_rn(_correction(log_beta2, count).to(tl.float32))
    direction = tl.where(mask, tl.div_rn(size * exp_avg, tl.div_rn(tl.sqrt_rn(exp_avg_sq), root) + eps), 0.0)
    _store_squares(at, squares, weight, _plus_decay(direction, weight, how, weight_decay))


@triton.jit
def lars_norms(
    table, pointers, squares, clip, weight_decay, momentum,
    HAS_CLIP: tl.constexpr, HAS_MOMENTUM: tl.constexpr,
    WEIGHT: tl.constexpr, GRADIENT: tl.constexpr, BUFFER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Squared norms of the weights and of the clipped gradient, (chunks, 2) float64. Moves nothing."""
    at, elements, mask, _how = _chunk(table, pointers, 4 if HAS_MOMENTUM else 3, BLOCK)
    weight = _load(at, 0, elements, mask, WEIGHT)
    gradient = _load(at, 1, elements, mask & (tl.load(at + 1) != 0), GRADIENT)
    if HAS_CLIP:
        gradient *= tl.load(clip).to(tl.float32)
    _store_squares(at, squares, weight, gradient)
