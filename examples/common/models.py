"""Sizes of GPT-2, BERT and ModernBERT, by name."""

from dataclasses import dataclass, field
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    ModernBertConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from .blocks import end_of_text

Shape = tuple[int, int, int]
"""Layers, width, heads."""

# "base" and up are the published GPT-2 models.
GPT2_SIZES = {
    "tiny": (4, 128, 4),
    "mini": (4, 256, 4),
    "small": (6, 384, 6),
    "base": (12, 768, 12),
    "medium": (24, 1024, 16),
    "large": (36, 1280, 20),
    "xl": (48, 1600, 25),
}

# All published: "base" and "large" in https://arxiv.org/abs/1810.04805, the others in https://arxiv.org/abs/1908.08962.
BERT_SIZES = {
    "tiny": (2, 128, 2),
    "mini": (4, 256, 4),
    "small": (4, 512, 8),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
}

# "base" and "large" are the published ones, https://arxiv.org/abs/2412.13663.
MODERNBERT_SIZES = {
    "tiny": (4, 128, 4),
    "mini": (6, 256, 4),
    "small": (10, 512, 8),
    "base": (22, 768, 12),
    "large": (28, 1024, 16),
}
_MODERNBERT_MLP = {"large": 2624}  # the others have 3/2 of the width, as "base" does


def _layers_by_width(sizes: dict[str, Shape]) -> str:
    return "Layers x width: " + ", ".join(f"{name} {layers}x{width}" for name, (layers, width, _) in sizes.items())


@dataclass
class GPT2Arguments:
    """Which GPT-2."""

    model_size: str = field(
        default="small",
        metadata={
            "choices": list(GPT2_SIZES),
            "help": f"{_layers_by_width(GPT2_SIZES)}. 'base' is the published GPT-2 (124 M parameters).",
        },
    )
    dropout: float = field(default=0.0, metadata={"help": "Probability of dropout, everywhere."})


@dataclass
class BertArguments:
    """Which BERT."""

    architecture: str = field(
        default="bert",
        metadata={
            "choices": ["bert", "modernbert"],
            "help": "BERT as published in 2018, or ModernBERT, which has rotary positions and norms before each layer.",
        },
    )
    model_size: str = field(
        default="small",
        metadata={
            "choices": list(BERT_SIZES),
            "help": f"{_layers_by_width(BERT_SIZES)}; of ModernBERT {_layers_by_width(MODERNBERT_SIZES)}. "
            "'base' and 'large' are the published ones.",
        },
    )
    dropout: float = field(default=0.0, metadata={"help": "Probability of dropout, everywhere; BERT's own is 0.1."})


def build_gpt2(args: GPT2Arguments, tokenizer: PreTrainedTokenizerFast, sequence_length: int) -> GPT2LMHeadModel:
    """A GPT-2 with weights from torch's global generator, partitioned at birth under ZeRO-3."""
    _prepare_partitioning()
    return gpt2(GPT2_SIZES[args.model_size], tokenizer, sequence_length, args.dropout)


def build_bert(args: BertArguments, tokenizer: PreTrainedTokenizerFast, sequence_length: int) -> PreTrainedModel:
    """A BERT or ModernBERT with the head that predicts masked tokens; otherwise as ``build_gpt2``."""
    _prepare_partitioning()
    if args.architecture == "bert":
        return bert(BERT_SIZES[args.model_size], tokenizer, sequence_length, args.dropout)
    more = {"intermediate_size": _MODERNBERT_MLP[args.model_size]} if args.model_size in _MODERNBERT_MLP else {}
    return modernbert(MODERNBERT_SIZES[args.model_size], tokenizer, sequence_length, args.dropout, **more)


def gpt2(
    shape: Shape, tokenizer: PreTrainedTokenizerFast, length: int, dropout: float = 0.0, **more: Any
) -> GPT2LMHeadModel:
    """A GPT-2 for blocks of ``length`` tokens; ``more`` goes to its config."""
    layers, width, heads = shape
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=length,
        n_layer=layers,
        n_embd=width,
        n_head=heads,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **more,
    )
    model = AutoModelForCausalLM.from_config(config)
    # transformers 5.23 infers the kind of loss from the class name, which GPT-2's does not tell.
    # The Trainer would then divide the loss of a block of T tokens by T, where T - 1 are predicted.
    model.loss_type = "ForCausalLM"
    return model


def bert(
    shape: Shape, tokenizer: PreTrainedTokenizerFast, length: int, dropout: float = 0.0, **more: Any
) -> BertForMaskedLM:
    """A BERT for blocks of ``length`` tokens; ``more`` goes to its config."""
    layers, width, heads = shape
    config = BertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=length,
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )
    model = AutoModelForMaskedLM.from_config(config)
    # In transformers 5.23 its forward takes the Trainer's count of predicted tokens, and leaves it unused. The Trainer
    # would believe that it averages over the update, and sum the losses of the micro-batches instead.
    model.accepts_loss_kwargs = False
    return model


def modernbert(
    shape: Shape, tokenizer: PreTrainedTokenizerFast, length: int, dropout: float = 0.0, **more: Any
) -> PreTrainedModel:
    """A ModernBERT for blocks of ``length`` tokens; ``more`` goes to its config."""
    layers, width, heads = shape
    end = end_of_text(tokenizer)
    settings = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": length,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": 3 * width // 2,
        "embedding_dropout": dropout,
        "attention_dropout": dropout,
        "mlp_dropout": dropout,
        "pad_token_id": tokenizer.pad_token_id,
    }
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), end)
    return AutoModelForMaskedLM.from_config(ModernBertConfig(**(settings | ends | more)))


def _prepare_partitioning() -> None:
    if is_deepspeed_zero3_enabled():
        import deepspeed

        deepspeed.init_distributed()  # on CPU, accelerate leaves it for later than partitioning
