"""The test model: a transformer of about 7,000 parameters with every awkward kind of parameter in it.

A tied weight (embedding and output head), a weight shared by both blocks (optional), a parameter of one element, one
of seven, one used only where the batch says so, one that is never used, a frozen one. Attention keys have no bias
unless a case asks for it: its true gradient is zero, and Adam would walk it at random.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

VOCAB, WIDTH, HEADS, LENGTH, BLOCKS = 37, 16, 2, 8, 2

NO_LENA = ("odd", "norm.weight", "h.1.norm_2.bias")


class Batch(NamedTuple):
    tokens: Tensor  # (size, LENGTH + 1)
    sometimes: bool  # whether the parameter `sometimes` is used


@dataclass(frozen=True)
class ModelOptions:
    """What varies between the models of two cases."""

    checkpointing: str = "none"  # "none", "non-reentrant", "reentrant" or "deepspeed"
    shared: bool = False  # one weight used inside both blocks
    key_bias: bool = False  # attention keys with a bias, whose true gradient is zero
    spare: bool = True  # a parameter that no forward uses
    bias: bool = False  # a second parameter that is used where the batch says so, `sometimes_bias`
    seed: int = 0


class Attention(nn.Module):
    def __init__(self, key_bias: bool) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH, bias=key_bias)
        self.value = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        scores = query @ key.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        mixed = scores.masked_fill(future, -1e4).softmax(-1) @ value
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, key_bias: bool, mix: nn.Linear | None) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention(key_bias)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        if self.mix is not None:
            x = x + self.mix(x)
        return x + self.down(torch.tanh(self.up(self.norm_2(x))))


class TinyTransformer(nn.Module):
    """`model(*batch)` gives the mean loss of the batch."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.checkpointing = options.checkpointing
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.position = nn.Parameter(torch.empty(LENGTH, WIDTH))
        self.scale = nn.Parameter(torch.empty(1))
        self.odd = nn.Parameter(torch.empty(7))
        self.sometimes = nn.Parameter(torch.empty(WIDTH, 5))
        self.sometimes_bias = nn.Parameter(torch.empty(5)) if options.bias else None
        self.fixed = nn.Parameter(torch.empty(WIDTH), requires_grad=False)
        if options.spare:
            self.spare = nn.Parameter(torch.empty(3, 5))
        mix = nn.Linear(WIDTH, WIDTH, bias=False) if options.shared else None
        self.h = nn.ModuleList(Block(options.key_bias, mix) for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, sometimes: bool) -> Tensor:
        x = self.embed(tokens[:, :-1]) + self.position + self.fixed
        for block in self.h:
            if self.checkpointing == "none":
                x = block(x)
            elif self.checkpointing == "deepspeed":
                from deepspeed import checkpointing

                x = checkpointing.checkpoint(block, x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpointing == "reentrant")
        x = self.norm(x)
        x = torch.cat([x[..., :7] * self.odd, x[..., 7:]], dim=-1)
        if sometimes:
            extra = x @ self.sometimes
            if self.sometimes_bias is not None:
                extra = extra + self.sometimes_bias
            x = x + F.pad(torch.tanh(extra), (0, WIDTH - 5))
        logits = self.head(x) * self.scale
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(wide).flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def initial_weights(options: ModelOptions) -> dict[str, Tensor]:
    """The same float64 weights wherever they are made; norms near 1, the rest near 0."""
    generator = torch.Generator().manual_seed(1000 + options.seed)
    weights = {}
    for name, parameter in TinyTransformer(options).named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        near_one = name in ("scale", "odd") or ("norm" in name and name.endswith("weight"))
        weights[name] = 1 + 0.1 * noise if near_one else 0.3 * noise
    return weights


@torch.no_grad()
def build(options: ModelOptions, dtype: torch.dtype) -> TinyTransformer:
    """The model with its initial weights."""
    model = TinyTransformer(options)
    for name, weight in initial_weights(options).items():
        model.get_parameter(name).copy_(weight)
    return model.to(dtype)


def make_batch(update: int, rank: int, micro: int, size: int, sometimes: bool) -> Batch:
    """A batch that only its place in the run decides. Low tokens are common, so the gradient has a signal."""
    generator = torch.Generator().manual_seed(7 + 10_000 * update + 100 * rank + micro)
    uniform = torch.rand(size, LENGTH + 1, generator=generator)
    return Batch((VOCAB * uniform**3).long(), sometimes)


def named_groups(model: nn.Module, lr: float) -> list[dict[str, Any]]:
    """Param groups of (name, parameter) pairs: decayed, not decayed at half the lr, and three without LENA."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    dims = {name: len(getattr(p, "ds_shape", p.shape)) for name, p in trained}  # zero.Init leaves p itself empty
    matrices = [(name, p) for name, p in trained if dims[name] > 1]
    others = [(name, p) for name, p in trained if dims[name] == 1 and name not in NO_LENA]
    without = [(name, p) for name, p in trained if name in NO_LENA]
    return [
        {"params": matrices, "lr": lr, "weight_decay": 0.1},
        {"params": others, "lr": lr / 2, "weight_decay": 0.0},
        {"params": without, "lr": lr, "weight_decay": 0.05, "lena": False},
    ]
