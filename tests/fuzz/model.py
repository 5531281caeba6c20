"""A model of a few hundred parameters, made of the kinds of parameter and of use that a draw asks for."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

VOCAB, WIDTH, LENGTH = 11, 8, 6
FEATURES = (
    "tied",  # the last layer is the embedding
    "reused",  # one weight is used three times in a pass
    "frozen",
    "scalar",  # of no dimension
    "single",  # of one element
    "odd",  # of a size that two, three or four ranks do not divide
    "spare",  # never used
    "sometimes",  # used where the batch says so
    "channels last",
    "transposed",
    "strided",  # a view with gaps
    "hook",  # the user masks a gradient by a tensor hook
    "late hook",  # the same, placed after LENA's
    "experts",  # the batch says which one is used
    "tiled",  # DeepSpeed's TiledMLP
    "fused loss",  # DeepSpeed's TiledFusedLogitsLoss, which calls backward in its forward
    "empty",  # of no element
    "expanded",  # its elements share one place in memory; refused
)
MEMORY = ("channels last", "transposed", "strided", "expanded")
HOOKS = ("hook", "late hook")
Batch = tuple[Tensor, bool, int, int]
"""Tokens (size, LENGTH + 1), whether `sometimes` is used, the number of the expert, what the loss is divided by."""


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.each = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, which: int) -> Tensor:
        return torch.tanh(self.each[which](x))


class Block(nn.Module):
    def __init__(self, mix: nn.Linear | None) -> None:
        super().__init__()
        self.norm, self.up, self.mix = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), mix

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.up(self.norm(x)))
        return x if self.mix is None else x + torch.tanh(self.mix(x))


class Model(nn.Module):
    """`model(*batch)` gives two losses, or their sum if `has_one_loss`.

    The reference `is_reference`: it has neither tiles nor tensor hooks, and writes a hook's mask into the forward pass.
    `autocast`: it runs in bf16 autocast.
    """

    def __init__(self, features: Collection[str], checkpointing: str = "none", is_reference: bool = False) -> None:
        super().__init__()
        self.features, self.checkpointing, self.is_reference = features, checkpointing, is_reference
        self.has_one_loss, self.autocast = True, False
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH, bias=False) if "reused" in features else None
        self.h = nn.ModuleList(Block(self.mix) for _ in range(2))
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        if "tied" in features:
            self.out.weight = self.embed.weight
        if "experts" in features:
            self.experts = Experts()
        if "tiled" in features:
            self.tiled = nn.Linear(WIDTH, WIDTH)
        if "fused loss" in features:
            self.fused = nn.Linear(WIDTH, 5, bias=False)
        if "channels last" in features:
            self.conv = nn.Conv2d(2, 2, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
        shapes = {
            "frozen": (WIDTH,),
            "scalar": (),
            "single": (1,),
            "odd": (7,),
            "spare": (3, 5),
            "sometimes": (8, 5),
            "empty": (0, 5),
        }
        own = {name: torch.empty(shape) for name, shape in shapes.items()}
        own |= {"hooked": torch.empty(WIDTH, WIDTH), "transposed": torch.empty(5, WIDTH).t()}
        own |= {"strided": torch.empty(WIDTH, 10)[:, ::2], "expanded": torch.ones(WIDTH, 1).expand(WIDTH, 5)}
        for name, values in own.items():
            if name in features or (name == "hooked" and self.has_hook):
                self.register_parameter(name, nn.Parameter(values, requires_grad=name != "frozen"))

    @property
    def has_hook(self) -> bool:
        return any(name in self.features for name in HOOKS)

    def place_hook(self) -> None:
        self.hooked.register_hook(lambda gradient: gradient * _mask(gradient))

    def forward(self, *batch: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext():
            losses = self._losses(*batch)
        return sum(losses) if self.has_one_loss else losses

    def _losses(self, tokens: Tensor, sometimes: bool, which: int, divisor: int) -> tuple[Tensor, Tensor]:
        x, has = self.embed(tokens[:, :-1]), self.features
        if "frozen" in has:
            x = x + self.frozen
        if "channels last" in has:
            x = x + self.conv(x.reshape(-1, 2, 4, LENGTH)).reshape(x.shape)
        for block in self.h:
            x = self._checkpointed(block, x)
        if self.mix is not None:
            x = x + self.mix(x)
        if "tiled" in has:
            x = x + self._in_tiles(x)
        if "experts" in has:
            x = x + self.experts(x, which)
        for name in (*MEMORY[1:], *(("sometimes",) if sometimes else ())):
            if name in has:
                x = x + F.pad(torch.tanh(x @ getattr(self, name)), (0, 3))
        if self.has_hook:
            x = x + torch.tanh(x @ self._hooked_weight())
        x = x + self.empty.sum() if "empty" in has else x
        x = self.norm(x)
        x = x * self.scalar if "scalar" in has else x
        x = x * self.single if "single" in has else x
        x = torch.cat([x[..., :7] * self.odd, x[..., 7:]], dim=-1) if "odd" in has else x
        logits = self.out(x)
        wide = torch.promote_types(logits.dtype, torch.float32)
        loss = F.cross_entropy(logits.to(wide).flatten(0, 1), tokens[:, 1:].flatten())
        second = 0.1 * x.to(wide).square().mean()
        return loss, second + self._fused_loss(x, divisor) if "fused loss" in has else second

    def _checkpointed(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.checkpointing == "none":
            return block(x)
        if self.checkpointing == "deepspeed":
            import deepspeed

            return deepspeed.checkpointing.checkpoint(block, x)
        return checkpoint(block, x, use_reentrant=self.checkpointing == "reentrant")

    def _in_tiles(self, x: Tensor) -> Tensor:
        if self.is_reference:
            return torch.tanh(self.tiled(x))
        from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

        weights = list(self.tiled.parameters())
        return TiledMLP.apply(lambda model, part: torch.tanh(model.tiled(part)), self, x, 3, weights)

    def _fused_loss(self, x: Tensor, divisor: int) -> Tensor:
        """What the shards add to the head's gradient in the forward is not divided."""
        if self.is_reference:
            weight = self.fused.weight
            return _square(F.linear(x, weight.detach())) + divisor * _square(F.linear(x.detach(), weight))
        from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

        labels = torch.zeros(x.shape[:2], dtype=torch.long)
        args = (x, labels, None, 3, [self.fused.weight], "mean")
        return TiledFusedLogitsLoss.apply(lambda model, part, _: _square(model.fused(part)), self, *args)

    def _hooked_weight(self) -> Tensor:
        if not self.is_reference:
            return self.hooked
        mask = _mask(self.hooked)
        return self.hooked * mask + self.hooked.detach() * (1 - mask)


def _square(x: Tensor) -> Tensor:
    return (x.float() if x.dtype == torch.bfloat16 else x).sub(1).square().mean()


def _mask(like: Tensor) -> Tensor:
    return (torch.arange(like.numel()).reshape(like.shape) % 3 > 0).to(like.dtype)


@torch.no_grad()
def initial_weights(features: Collection[str]) -> dict[str, Tensor]:
    """The same float64 weights wherever they are made; factors near 1, the rest near 0."""
    generator = torch.Generator().manual_seed(1000)
    weights = {}
    for name, p in Model(features).named_parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        near_one = name in ("scalar", "single", "odd") or name.endswith("norm.weight")
        weights[name] = 1 + 0.1 * noise if near_one else 0.3 * noise
    return weights


@torch.no_grad()
def build(features: Collection[str], checkpointing: str = "none", is_reference: bool = False) -> Model:
    """The model with its initial weights, in float64 for the reference, else in float32."""
    model = Model(features, checkpointing, is_reference)
    for name, weight in initial_weights(features).items():
        if name != "expanded":
            model.get_parameter(name).copy_(weight)
    return model.double() if is_reference else model


def make_tokens(update: int, rank: int, micro: int, size: int) -> Tensor:
    """(size, LENGTH + 1) tokens that only their place decides. Low ones are common, so the gradient has a signal."""
    generator = torch.Generator().manual_seed(7 + 10_000 * update + 100 * rank + micro)
    return (VOCAB * torch.rand(size, LENGTH + 1, generator=generator) ** 3).long()
