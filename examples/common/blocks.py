"""From texts to blocks of tokens: a tokenizer, the packing, and what a unigram model makes of the blocks."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
MASK = "<|mask|>"
_TOKENIZER_TEXTS = 200_000  # more texts than this no longer change the merges

Rows = list[dict[str, list[int]]]


def train_tokenizer(texts: Dataset, vocab_size: int, with_mask: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of ``vocab_size`` tokens, or fewer where the texts run out of pairs.

    Every byte and the end of a text are tokens; ``with_mask`` adds the mask of a masked language model.
    """
    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT} | ({"mask_token": MASK} if with_mask else {})
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=sorted(set(special.values())),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = texts.select(range(0, len(texts), max(1, len(texts) // _TOKENIZER_TEXTS)))
    bpe.train_from_iterator((batch["text"] for batch in sample.iter(1000)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **special)


def end_of_text(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The token after a text; BERT's tokenizers call it the separator."""
    return tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id


def pack(texts: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerFast, length: int) -> Any:
    """Cut texts to blocks of ``length`` tokens, a thousand texts at a time: a data set of ``{"input_ids": …}``.

    Texts are joined, each closed by the end-of-text token; what does not fill a block at the end is dropped.
    """
    end = end_of_text(tokenizer)

    def cut(batch: dict[str, list[str]]) -> dict[str, np.ndarray]:
        ids = tokenizer(batch["text"], add_special_tokens=False)["input_ids"]
        tokens = np.concatenate([[*text, end] for text in ids]).astype(np.int32)
        blocks = len(tokens) // length
        return {"input_ids": tokens[: blocks * length].reshape(blocks, length)}

    features = Features({"input_ids": List(Value("int32"), length=length)})
    return texts.map(cut, batched=True, remove_columns=["text"], features=features)


def stack(rows: Rows) -> torch.Tensor:
    """The token ids of some blocks, (batch, sequence_length)."""
    return torch.from_numpy(np.array([row["input_ids"] for row in rows], dtype=np.int64))


def unigram_loss(train: Dataset, asked: Iterable[torch.Tensor], vocab_size: int) -> float:
    """What a model loses that knows nothing but how often each token occurs in ``train``, in nats per token.

    Args:
        train: blocks of token ids.
        asked: the tokens to predict, (batch, sequence_length) each; -100 where none is.
    """
    counts = np.ones(vocab_size)  # add-one smoothing
    for batch in train.with_format("numpy").iter(1000):
        counts += np.bincount(batch["input_ids"].ravel(), minlength=vocab_size)
    tokens = torch.cat([labels[labels != -100] for labels in asked]).numpy()
    return float(-np.log(counts / counts.sum())[tokens].mean())
