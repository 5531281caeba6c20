"""Options of the data that another option would have ignored."""

from collections.abc import Collection, Iterator

from .corpus import DataArguments
from .errors import InputError
from .texts import local_files

_OF_A_STREAM = ("held_out_texts", "sample_texts", "shuffle_texts")
_OF_THE_HUB = ("dataset_config", "text_column")


def refuse_ignored(data: DataArguments, typed: Collection[str]) -> None:
    """Raise where one of ``typed``, the options that were given, would change nothing.

    Raises:
        InputError: which, and why; or there are no such texts.
    """
    for name, why in _ignored(data):
        if name in typed:
            raise InputError(f"--{name} {getattr(data, name)} would be ignored: {why}. Leave --{name} out.")


def _ignored(data: DataArguments) -> Iterator[tuple[str, str]]:
    if data.tokenizer is not None:
        yield "vocab_size", "it is for a tokenizer trained on the texts, and --tokenizer brings one"
    if local_files(data.dataset):
        yield from ((name, f"it is for data sets of the hub, and {data.dataset} is none") for name in _OF_THE_HUB)
    if data.streaming:
        yield "held_out_fraction", "--streaming holds out --held_out_texts"
    else:
        yield from ((name, "it is for --streaming") for name in _OF_A_STREAM)
    if data.dataset == "sotu":
        yield "held_out_fraction", "of sotu the years that end in 7 are held out"
