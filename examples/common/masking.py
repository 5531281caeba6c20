"""The masks of a masked language model, the same whenever the same batch comes again."""

import zlib

import torch
from torch import Tensor
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase


class Masking:
    """Mask 15% of the tokens, as BERT does: 80% by the mask, 10% by another token, 10% left as they are.

    Source: Devlin et al., https://arxiv.org/abs/1810.04805, section 3.1. The masks are a function of ``seed`` and of
    the batch alone, so that a resumed run sees those of an unbroken one. Batches are shuffled anew in every epoch, and
    so are their masks; only a batch of a single row keeps its mask.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self._collator = DataCollatorForLanguageModeling(tokenizer)
        self._special = torch.tensor(sorted(tokenizer.all_special_ids))
        self._seed = seed

    def __call__(self, input_ids: Tensor) -> dict[str, Tensor]:
        """``input_ids`` and ``labels``, (batch, sequence_length) each; labels are -100 where nothing is predicted."""
        self._collator.generator = torch.Generator().manual_seed(zlib.crc32(input_ids.numpy().tobytes(), self._seed))
        special = torch.isin(input_ids, self._special)
        masked, labels = self._collator.torch_mask_tokens(input_ids.clone(), special_tokens_mask=special)
        return {"input_ids": masked, "labels": labels}
