"""Sizes of GPT-2, by name."""

from dataclasses import dataclass, field

import deepspeed
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.integrations import is_deepspeed_zero3_enabled

# name: (layers, width, heads). "base" and up are the published GPT-2 models.
GPT2_SIZES = {
    "tiny": (4, 128, 4),
    "mini": (4, 256, 4),
    "small": (6, 384, 6),
    "base": (12, 768, 12),
    "medium": (24, 1024, 16),
    "large": (36, 1280, 20),
    "xl": (48, 1600, 25),
}


@dataclass
class ModelArguments:
    """Which model."""

    model_size: str = field(
        default="small",
        metadata={
            "choices": list(GPT2_SIZES),
            "help": "Layers x width: "
            + ", ".join(f"{name} {layers}x{width}" for name, (layers, width, _) in GPT2_SIZES.items())
            + ". 'base' is the published GPT-2 (124 M parameters).",
        },
    )
    dropout: float = field(default=0.0, metadata={"help": "Probability of dropout, everywhere."})


def build_gpt2(args: ModelArguments, tokenizer: PreTrainedTokenizerFast, sequence_length: int) -> GPT2LMHeadModel:
    """A GPT-2 with weights from torch's global generator, partitioned at birth under ZeRO-3."""
    layers, width, heads = GPT2_SIZES[args.model_size]
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=sequence_length,
        n_layer=layers,
        n_embd=width,
        n_head=heads,
        resid_pdrop=args.dropout,
        embd_pdrop=args.dropout,
        attn_pdrop=args.dropout,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    if is_deepspeed_zero3_enabled():
        deepspeed.init_distributed()  # on CPU, accelerate leaves it for later than partitioning
    model = AutoModelForCausalLM.from_config(config)
    # transformers 5.23 infers the kind of loss from the class name, which GPT-2's does not tell.
    # The Trainer would then divide the loss of a block of T tokens by T, where T - 1 are predicted.
    model.loss_type = "ForCausalLM"
    return model
