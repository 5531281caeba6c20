"""Which checkpoint to resume from."""

import re
import zipfile
from pathlib import Path

from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from .errors import InputError


def choose_checkpoint(args: TrainingArguments) -> str | None:
    """What `--resume_from_checkpoint` stands for. The first rank looks, and all ranks take what it found.

    Raises:
        InputError: on every rank; no complete checkpoint there.
    """
    asked = args.resume_from_checkpoint
    if asked is None:
        return None
    found: list[str | None] = [None, None]  # the checkpoint, or what is wrong
    if args.process_index == 0:
        # With `save_on_each_node` the other nodes' files are elsewhere.
        ranks = None if args.save_on_each_node else args.world_size
        try:
            found[0] = find_checkpoint(asked, Path(str(args.output_dir)), ranks)
        except InputError as error:
            found[1] = str(error)
    broadcast_object_list(found)
    if found[1] is not None:
        raise InputError(found[1])
    return found[0]


def find_checkpoint(asked: str, output_dir: Path, ranks: int | None) -> str:
    """The checkpoint ``asked`` for: a path, or ``latest`` for the newest complete one in ``output_dir``.

    Args:
        ranks: how many must have written it; None if that cannot be seen here.

    Raises:
        InputError: no complete checkpoint there.
    """
    by = f" of {ranks} rank(s)" if ranks else ""
    if asked != "latest":
        if not is_complete(Path(asked), ranks):
            raise InputError(f"{asked}: no complete checkpoint{by} here")
        return asked
    numbered = [folder for folder in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name)]
    for folder in sorted(numbered, key=lambda folder: int(folder.name.split("-")[1]), reverse=True):
        if is_complete(folder, ranks):
            return str(folder)
    raise InputError(f"{output_dir}: no complete checkpoint{by} to resume from")


def is_complete(folder: Path, ranks: int | None) -> bool:
    """Whether all ranks were done with writing this checkpoint.

    The first rank writes the Trainer's state last, but does not wait for the others' random states. What torch writes
    is a zip file, whose table of contents comes at its end.
    """
    random_states = len(list(folder.glob("rng_state*.pth")))
    if not (folder / TRAINER_STATE_NAME).is_file() or random_states != (ranks or random_states):
        return False
    return all(zipfile.is_zipfile(file) for file in folder.rglob("*") if file.suffix in (".pt", ".pth"))
