"""The language models of the comparison."""

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy

from examples.common.blocks import train_tokenizer
from examples.compare.models import ARCHITECTURES, MASKED, build

SHAPE = {"layers": 2, "width": 16, "heads": 2, "initializer_range": 0.5}
LENGTH = 8


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(Dataset.from_dict({"text": ["we the people"]}), 258, with_mask=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_loss_is_that_of_the_tokens_that_are_predicted(architecture, tokenizer):
    torch.manual_seed(0)
    model = build(SHAPE | {"architecture": architecture}, tokenizer, LENGTH)
    tokens = torch.randint(len(tokenizer), (3, LENGTH))
    if architecture in MASKED:
        labels = tokens.masked_fill(torch.rand(3, LENGTH) < 0.5, -100)
        found = model(input_ids=tokens, labels=labels)
        expected = cross_entropy(found.logits.flatten(0, 1), labels.flatten())
    else:
        found = model(input_ids=tokens, labels=tokens)
        expected = cross_entropy(found.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(found.loss, expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shape_and_initial_weights_are_as_asked_for(architecture, tokenizer):
    torch.manual_seed(0)
    model = build(SHAPE | {"architecture": architecture}, tokenizer, LENGTH)
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (2, 16, 2)
    assert config.vocab_size == len(tokenizer)
    assert model.get_input_embeddings().weight.std().item() == pytest.approx(0.5, rel=0.15)  # ModernBERT truncates
