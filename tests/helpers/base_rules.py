"""LARS and LAMB written literally from their papers, one whole tensor at a time; nothing shared with the library.

The ratio is 1 for a tensor of fewer than two dimensions, and where either of its norms is 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _PerTensor(torch.optim.Optimizer):
    def __init__(self, groups: Any, **defaults: Any) -> None:
        super().__init__(groups, {"lr": 0.0, **defaults})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is not None:
                    self.move(w, w.grad, self.state[w], group)

    def move(self, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        raise NotImplementedError


class Lars(_PerTensor):
    """arXiv 1708.03888: v = momentum v + lr ratio (g + decay w), w -= v."""

    def move(self, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        decay, ratio = group["weight_decay"], 1.0
        if w.dim() > 1 and float(w.norm()) > 0 and float(g.norm()) > 0:
            ratio = group["trust_coefficient"] * float(w.norm()) / (float(g.norm()) + decay * float(w.norm()))
            ratio = _clipped(ratio, group["trust_clip"])
        old = state.get("v", torch.zeros_like(w))
        state["v"] = group["momentum"] * old + group["lr"] * ratio * (g + decay * w)
        w -= state["v"]


class Lamb(_PerTensor):
    """arXiv 1904.00962 with bias correction: u = m^ / (sqrt(v^) + eps) + decay w, w -= lr ratio u."""

    def move(self, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        t = state["t"] = state.get("t", 0) + 1
        state["m"] = beta1 * state.get("m", torch.zeros_like(w)) + (1 - beta1) * g
        state["v"] = beta2 * state.get("v", torch.zeros_like(w)) + (1 - beta2) * g**2
        m, v = state["m"] / (1 - beta1**t), state["v"] / (1 - beta2**t)
        u = m / (v.sqrt() + group["eps"]) + group["weight_decay"] * w
        ratio = 1.0
        if w.dim() > 1 and float(w.norm()) > 0 and float(u.norm()) > 0:
            ratio = _clipped(group["trust_coefficient"] * float(w.norm()) / float(u.norm()), group["trust_clip"])
        w -= group["lr"] * ratio * u


def _clipped(ratio: float, bounds: tuple[float, float] | None) -> float:
    return ratio if bounds is None else min(max(ratio, bounds[0]), bounds[1])
