"""What is compared: optimizers with the same hyperparameters, by the name that the tables show, and models to train."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import ds_lena

ADAM: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
MOMENTUM: dict[str, Any] = {"lr": 1e-5, "momentum": 0.9, "weight_decay": 0.01}
KEYS = {"adamw": ADAM, "lamb": ADAM, "lars": MOMENTUM, "sgd": MOMENTUM}

ADAMW, FUSED_ADAM = "AdamW, fused", "DeepSpeed FusedAdam"
LENA = {base: f"LENA ({base})" for base in KEYS}
STOCK = {"adamw": ADAMW, "lamb": "timm Lamb", "lars": "timm Lars", "sgd": "SGD, fused"}
"""By base rule: LENA, and the optimizer that moves parameters by the same rule."""


class NotAvailable(Exception):
    """Why an optimizer cannot be measured here."""


def make(name: str, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """The optimizer of this name.

    Raises:
        NotAvailable: it is not installed, cannot be built, or does not run on the parameters' device.
    """
    parameters = list(parameters)
    try:
        return MAKERS[name](parameters)
    except (ImportError, ds_lena.LenaError) as error:
        raise NotAvailable(str(error)) from error


def available(names: Iterable[str], device: torch.device) -> list[str]:
    """Those that can be made for parameters on this device; says why the others cannot.

    It tries them on one number, so that what has to be compiled is compiled.
    """
    found = []
    for name in names:
        try:
            make(name, [nn.Parameter(torch.zeros(1, device=device))])
            found.append(name)
        except NotAvailable as reason:
            print(f"left out: {name}: {reason}", file=sys.stderr)
    return found


def rivals(base: str, device: torch.device) -> list[str]:
    """Whom LENA is compared with, as far as available; the first has the same rule, if any has."""
    return available([FUSED_ADAM, ADAMW] if base == "adamw" else [STOCK[base], FUSED_ADAM, ADAMW], device)


def _from_deepspeed(name: str, device: str, parameters: Sequence[Tensor], **keys: Any) -> torch.optim.Optimizer:
    """An optimizer that DeepSpeed compiles when it is first made."""
    if (parameters[0].device.type == "cpu") != (device == "CPU"):
        raise NotAvailable(f"for parameters on a {device} only")
    try:
        return getattr(importlib.import_module("deepspeed.ops.adam"), name)(parameters, **keys, **ADAM)
    except Exception as error:  # whatever a compiler, ninja or CUDA may have to say
        raise NotAvailable(f"cannot be built: {error}") from error


def timm_module(name: str) -> ModuleType:
    """One module of timm.optim. Importing timm itself needs torchvision, which optimizers do not."""
    found = importlib.util.find_spec("timm")  # looks, and runs nothing
    if found is None or found.submodule_search_locations is None:
        raise NotAvailable("timm is not installed")
    if "timm" not in sys.modules:
        top, optim = ModuleType("timm"), ModuleType("timm.optim")  # in place of the two __init__.py
        top.__path__ = list(found.submodule_search_locations)
        optim.__path__ = [f"{path}/optim" for path in top.__path__]
        top.__spec__ = found
        sys.modules |= {"timm": top, "timm.optim": optim}
    return importlib.import_module(f"timm.optim.{name}")


MAKERS: dict[str, Callable[[Sequence[Tensor]], torch.optim.Optimizer]] = {
    ADAMW: partial(torch.optim.AdamW, fused=True, **ADAM),
    "AdamW, foreach": partial(torch.optim.AdamW, foreach=True, **ADAM),
    "DeepSpeedCPUAdam": partial(_from_deepspeed, "DeepSpeedCPUAdam", "CPU", adamw_mode=True),
    FUSED_ADAM: partial(_from_deepspeed, "FusedAdam", "GPU", adam_w_mode=True),
    # Without its clipping by the norm of all gradients, which the others do not do.
    "timm Lamb": lambda p: timm_module("lamb").Lamb(p, max_grad_norm=None, always_adapt=True, **ADAM),
    "timm Lars": lambda p: timm_module("lars").Lars(p, always_adapt=True, **MOMENTUM),
    "SGD, fused": partial(torch.optim.SGD, fused=True, **MOMENTUM),
    **{LENA[base]: partial(ds_lena.LENA, base=base, total_steps=1_000_000, **keys) for base, keys in KEYS.items()},
}

POSITIONS = 1024
SIZES = {  # layers, width, heads, vocabulary of a GPT-2
    "tiny": (2, 128, 2, 1024),  # 0.7 M parameters in 28 tensors
    "30m": (8, 512, 8, 8192),  # 29.9 M in 100
    "gpt2": (12, 768, 12, 50257),  # 124.4 M in 148, the published GPT-2
    "gpt2-xl": (48, 1600, 25, 50257),  # 1.56 G in 580
}


def build_model(name: str) -> Any:
    """From scratch. Without dropout: its random numbers take time that has nothing to do with the optimizer."""
    from transformers import GPT2Config, GPT2LMHeadModel  # slow to import, and not needed for every benchmark

    layers, width, heads, vocabulary = SIZES[name]
    shape = {"n_layer": layers, "n_embd": width, "n_head": heads, "vocab_size": vocabulary, "n_positions": POSITIONS}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**shape, **no_dropout, bos_token_id=0, eos_token_id=0, use_cache=False))
    model.loss_type = "ForCausalLM"  # transformers cannot tell from the name of the class, and warns
    return model


def random_tokens(model: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Token ids for the model of this name."""
    return torch.randint(SIZES[model][-1], shape, generator=torch.Generator().manual_seed(seed))


class Chain(nn.Module):
    """A deep and narrow residual network of `tensors` tensors, half of them biases, of at most `elements` in all."""

    def __init__(self, tensors: int, elements: int) -> None:
        super().__init__()
        each = elements / (tensors // 2)  # a layer of width w has w (w + 1)
        self.width = max(int((math.sqrt(1 + 4 * each) - 1) / 2), 1)
        self.layers = nn.ModuleList(nn.Linear(self.width, self.width) for _ in range(tensors // 2))

    def forward(self, x: Tensor) -> Tensor:
        scale = len(self.layers) ** -0.5  # so that the sum stays finite, however long the chain
        for layer in self.layers:
            x = torch.add(x, layer(torch.relu(x)), alpha=scale)
        return x
