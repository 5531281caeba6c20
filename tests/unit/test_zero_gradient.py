"""A tensor whose true gradient is zero: the bias of attention keys, which softmax cancels. It shows rounding alone."""

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

import ds_lena

VOCABULARY, LENGTH = 100, 16


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def trained(request) -> tuple[torch.dtype, BertForMaskedLM, dict]:
    """A small BERT after six updates of 16 micro-batches, and LENA's report."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(
        vocab_size=VOCABULARY, max_position_embeddings=LENGTH, initializer_range=0.1, **shape, **no_dropout
    )
    model = BertForMaskedLM(config).to(request.param)
    optimizer = ds_lena.LENA(model.named_parameters(), lr=1e-3, warmup="none")
    for _ in range(6):
        for _ in range(16):
            rows = torch.randint(0, VOCABULARY, (4, LENGTH))
            (model(input_ids=rows, labels=(7 * rows) % VOCABULARY).loss / 16).backward()
        optimizer.step()
        optimizer.zero_grad()
    return request.param, model, ds_lena.report(optimizer)


def test_a_key_bias_is_held_still_in_fp32_and_moves_like_any_bias_in_bf16(trained):
    dtype, model, report = trained
    for number, block in enumerate(model.bert.encoder.layer):
        attention = block.attention.self
        layer = report["layers"][f"bert.encoder.layer.{number}.attention.self.key.bias"]
        moved = (attention.key.bias.detach().abs().max() / attention.query.bias.detach().abs().max()).item()
        if dtype == torch.float32:
            assert layer["gain"] == pytest.approx(1, abs=1e-3) and moved < 0.01
        else:
            assert layer["gain"] < 4 * report["gain"] and moved < 1.5
