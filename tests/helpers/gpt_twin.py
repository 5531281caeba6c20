"""A GPT written out in torch, with Megatron-core's names of parameters and its layout of queries, keys and values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, WIDTH, HEADS, LENGTH, LAYERS = 40, 16, 4, 8, 2


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """All are (batch, head, place, size)."""
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -10000.0).softmax(-1) @ value


class Attention(nn.Module):
    def __init__(self, head_norms: bool) -> None:
        super().__init__()
        self.attend = attend
        self.linear_proj = nn.Linear(WIDTH, WIDTH)
        self.linear_qkv = nn.Linear(WIDTH, 3 * WIDTH)
        if head_norms:
            self.q_layernorm, self.k_layernorm = nn.LayerNorm(WIDTH // HEADS), nn.LayerNorm(WIDTH // HEADS)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.linear_qkv(x).unflatten(-1, (HEADS, 3, -1)).transpose(1, 2)  # (batch, head, place, 3, size)
        query, key, value = heads.unbind(-2)
        if hasattr(self, "q_layernorm"):
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        return self.linear_proj(self.attend(query, key, value).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear_fc1, self.linear_fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))


class Layer(nn.Module):
    def __init__(self, head_norms: bool) -> None:
        super().__init__()
        self.input_layernorm, self.pre_mlp_layernorm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.self_attention, self.mlp = Attention(head_norms), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attention(self.input_layernorm(x))
        return x + self.mlp(self.pre_mlp_layernorm(x))


class GptTwin(nn.Module):
    """`twin(tokens, _)` is the mean loss. `tied`: the output layer is the embedding."""

    def __init__(self, tied: bool = False, head_norms: bool = False) -> None:
        super().__init__()
        self.tied = tied
        self.embedding, self.decoder = nn.Module(), nn.Module()
        self.embedding.word_embeddings = nn.Embedding(VOCAB, WIDTH)
        self.embedding.position_embeddings = nn.Embedding(LENGTH, WIDTH)
        self.decoder.layers = nn.ModuleList(Layer(head_norms) for _ in range(LAYERS))
        self.decoder.final_layernorm = nn.LayerNorm(WIDTH)
        if not tied:
            self.output_layer = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens: Tensor, _: bool = False) -> Tensor:
        return self.loss(self.body(tokens[:, :-1], torch.arange(LENGTH)), tokens[:, 1:])

    def body(self, tokens: Tensor, places: Tensor) -> Tensor:
        x = self.embedding.word_embeddings(tokens) + self.embedding.position_embeddings(places)
        for layer in self.decoder.layers:
            x = layer(x)
        return x

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        output = self.embedding.word_embeddings.weight if self.tied else self.output_layer.weight
        logits = F.linear(self.decoder.final_layernorm(x), output)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
