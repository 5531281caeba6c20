"""Sizes of GPT-2, BERT and ModernBERT, by name."""

from dataclasses import dataclass
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    GPT2Config,
    ModernBertConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from .blocks import end_of_text
from .options import option

Shape = tuple[int, int, int]
"""Layers, width, heads."""

_BASE, _LARGE = (12, 768, 12), (24, 1024, 16)

# "base" and up are the published GPT-2 models.
GPT2_SIZES = {"tiny": (4, 128, 4), "mini": (4, 256, 4), "small": (6, 384, 6), "base": _BASE, "medium": _LARGE}
GPT2_SIZES |= {"large": (36, 1280, 20), "xl": (48, 1600, 25)}

# All published: "base" and "large" in https://arxiv.org/abs/1810.04805, the others in https://arxiv.org/abs/1908.08962.
BERT_SIZES = {"tiny": (2, 128, 2), "mini": (4, 256, 4), "small": (4, 512, 8), "base": _BASE, "large": _LARGE}

# "base" and "large" are the published ones, https://arxiv.org/abs/2412.13663.
MODERNBERT_SIZES = {"tiny": (4, 128, 4), "mini": (6, 256, 4), "small": (10, 512, 8)}
MODERNBERT_SIZES |= {"base": (22, 768, 12), "large": (28, 1024, 16)}


_DROPOUT = "Probability of dropout, everywhere; the published models have 0.1."


@dataclass
class GPT2Arguments:
    """Which GPT-2."""

    model_size: str = option("small", "'base' and up are published.", choices=list(GPT2_SIZES))
    dropout: float = option(0.0, _DROPOUT)


@dataclass
class BertArguments:
    """Which BERT: that of 2018, or ModernBERT, which has rotary positions and norms before each layer."""

    architecture: str = option("bert", "BERT of 2018, or ModernBERT of 2024.", choices=["bert", "modernbert"])
    model_size: str = option("small", "'base' and 'large' are published.", choices=list(BERT_SIZES))
    dropout: float = option(0.0, _DROPOUT)


def build_gpt2(args: GPT2Arguments, tokenizer: PreTrainedTokenizerFast, sequence_length: int) -> PreTrainedModel:
    """A GPT-2 with weights from torch's global generator, partitioned at birth under ZeRO-3."""
    _prepare_partitioning()
    return gpt2(GPT2_SIZES[args.model_size], tokenizer, sequence_length, args.dropout)


def build_bert(args: BertArguments, tokenizer: PreTrainedTokenizerFast, sequence_length: int) -> PreTrainedModel:
    """A BERT or ModernBERT with the head that predicts masked tokens; otherwise as ``build_gpt2``."""
    _prepare_partitioning()
    if args.architecture == "bert":
        return bert(BERT_SIZES[args.model_size], tokenizer, sequence_length, args.dropout)
    more = {"intermediate_size": 2624} if args.model_size == "large" else {}  # as published
    return modernbert(MODERNBERT_SIZES[args.model_size], tokenizer, sequence_length, args.dropout, **more)


def gpt2(shape: Shape, tokenizer: PreTrainedTokenizerFast, length: int, dropout: float = 0.0, **more: Any) -> Any:
    """A GPT-2 for blocks of ``length`` tokens; ``more`` goes to its config."""
    more |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    more |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = AutoModelForCausalLM.from_config(GPT2Config(**_common(shape, tokenizer, length), **more))
    # transformers 5.23 infers the kind of loss from the class name, which GPT-2's does not tell.
    # The Trainer would then divide the loss of a block of T tokens by T, where T - 1 are predicted.
    model.loss_type = "ForCausalLM"
    return model


def bert(shape: Shape, tokenizer: PreTrainedTokenizerFast, length: int, dropout: float = 0.0, **more: Any) -> Any:
    """A BERT for blocks of ``length`` tokens; ``more`` goes to its config."""
    more |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), dropout)
    more |= {"intermediate_size": 4 * shape[1], "pad_token_id": tokenizer.pad_token_id}
    model = AutoModelForMaskedLM.from_config(BertConfig(**_common(shape, tokenizer, length), **more))
    # In transformers 5.23 its forward takes the Trainer's count of predicted tokens, and leaves it unused. The Trainer
    # would believe that it averages over the update, and sum the losses of the micro-batches instead.
    model.accepts_loss_kwargs = False
    return model


def modernbert(shape: Shape, tokenizer: PreTrainedTokenizerFast, length: int, dropout: float = 0.0, **more: Any) -> Any:
    """A ModernBERT for blocks of ``length`` tokens; ``more`` goes to its config."""
    settings = dict.fromkeys(("embedding_dropout", "attention_dropout", "mlp_dropout"), dropout)
    settings |= dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), end_of_text(tokenizer))
    settings |= {"intermediate_size": 3 * shape[1] // 2, "pad_token_id": tokenizer.pad_token_id}
    return AutoModelForMaskedLM.from_config(ModernBertConfig(**_common(shape, tokenizer, length), **settings | more))


def _common(shape: Shape, tokenizer: PreTrainedTokenizerFast, length: int) -> dict[str, int]:
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads")
    return {"vocab_size": len(tokenizer), "max_position_embeddings": length} | dict(zip(names, shape, strict=True))


def _prepare_partitioning() -> None:
    if is_deepspeed_zero3_enabled():
        import deepspeed

        deepspeed.init_distributed()  # on CPU, accelerate leaves it for later than partitioning
