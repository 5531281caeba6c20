"""A small language model with two layers of experts: whole in one process, or with layers of `deepspeed.moe`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.model import LENGTH, VOCAB, WIDTH, Attention

EXPERTS = 4
LIKED = (3.0, 1.0, -1.0, -3.0)  # how far apart a token's logits of the experts are, about
AUX = 0.05  # weight of the loss that spreads tokens evenly


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wg = nn.Linear(WIDTH, EXPERTS, bias=False)


class AllExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.deepspeed_experts = nn.ModuleList(Expert() for _ in range(EXPERTS))


class Routed(nn.Module):
    """Every token goes to the `k` experts that its gate likes best. None is dropped."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k, self.gate, self.experts = k, Gate(), AllExperts()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gates = F.softmax(F.linear(_wide(x), _wide(self.gate.wg.weight)), dim=1)
        best = gates.topk(self.k, dim=1).indices
        weights = gates.gather(1, best)
        if self.k > 1:
            weights = weights / weights.sum(1, keepdim=True)
        total = torch.zeros_like(_wide(x))
        for number, expert in enumerate(self.experts.deepspeed_experts):
            tokens, choice = (best == number).nonzero(as_tuple=True)
            if len(tokens):
                out = expert(x[tokens]) * weights[tokens, choice].unsqueeze(1)
                total = total.index_add(0, tokens, out)
        share = F.one_hot(best[:, 0], EXPERTS).to(gates).mean(0)
        return total.to(x.dtype), (gates.mean(0) * share).sum() * EXPERTS


class MoeTwin(nn.Module):
    """`deepspeed.moe.layer.MoE`, literally."""

    def __init__(self, k: int, residual: bool) -> None:
        super().__init__()
        self.deepspeed_moe = Routed(k)
        if residual:
            self.mlp, self.coefficient = Expert(), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, aux = self.deepspeed_moe(x.reshape(-1, WIDTH))
        out = out.view_as(x)
        if hasattr(self, "mlp"):
            part = F.softmax(self.coefficient(x), dim=-1)
            out = out * part[..., :1] + self.mlp(x) * part[..., 1:]
        return out, aux


class MoeBlock(nn.Module):
    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.moe = Attention(key_bias=False), moe

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.attention(self.norm_1(x))
        out, aux, *_ = self.moe(self.norm_2(x))
        return x + out, aux


class MoeModel(nn.Module):
    """`model(tokens, _)` is the loss. `first`, `second`: the layers of experts."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(VOCAB, WIDTH), nn.Parameter(torch.zeros(LENGTH, WIDTH))
        self.h = nn.ModuleList([MoeBlock(first), MoeBlock(second)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens: Tensor, _: bool = False) -> Tensor:
        x, losses = self.embed(tokens[:, :-1]) + self.position, []
        for block in self.h:
            x, aux = block(x)
            losses.append(aux)
        logits = _wide(self.head(self.norm(x)))
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) + AUX * sum(losses)


def moe_twin() -> nn.Module:
    """The whole model, with all experts."""
    return MoeModel(MoeTwin(1, residual=False), MoeTwin(2, residual=True))


@torch.no_grad()
def route_clearly(model: nn.Module) -> None:
    """Have the token decide the experts, so that no rounding does. In the first layer 2 is idle, and 3 often is."""
    for token, row in enumerate(model.embed.weight):
        best = 3 if token == VOCAB - 1 else token % 2
        order = [best, *[number for number in range(EXPERTS) if number != best]]
        second = 1 + token // 2 % (EXPERTS - 1)
        order.insert(1, order.pop(second))
        for liking, number in zip(LIKED, order, strict=True):
            row[number] = liking
    for block in model.h:
        gate = block.moe.deepspeed_moe.gate.wg.weight
        gate.mul_(0.3)[:, :EXPERTS] += torch.eye(EXPERTS)


def expert_name(name: str, rank: int, ranks: int, spread: str) -> str:
    """In the whole model, of a parameter on the rank with this number among those that share a layer's experts.

    `spread`: how the names of the layers begin that are shared.
    """
    before, mark, after = name.partition(".deepspeed_experts.")
    if not mark or not name.startswith(spread):
        return name
    local, _, rest = after.partition(".")
    return f"{before}{mark}{int(local) + rank * EXPERTS // ranks}.{rest}"


@torch.no_grad()
def with_deepspeed_moe(whole: nn.Module, rank: int, ranks: int, spread: str) -> nn.Module:
    """The model in float32 with its experts on `ranks` ranks, and with the weights of `whole`."""
    from deepspeed.moe.layer import MoE

    exact = {"drop_tokens": False, "use_rts": False, "top2_2nd_expert_sampling": False}

    def layer(name: str, k: int, residual: bool) -> nn.Module:
        size = ranks if name.startswith(spread) else 1
        return MoE(WIDTH, Expert(), EXPERTS, ep_size=size, k=k, use_residual=residual, **exact)

    model = MoeModel(layer("h.0.", 1, residual=False), layer("h.1.", 2, residual=True))
    weights = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[expert_name(name, rank, ranks, spread)])
    return model
