"""Which checkpoint to resume from."""

import re
import zipfile
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from .errors import InputError


def find_checkpoint(asked: str | None, output_dir: Path, ranks: int) -> str | None:
    """The checkpoint to resume from: ``asked`` is a path, ``latest`` in ``output_dir``, or None.

    Raises:
        InputError: no complete checkpoint there.
    """
    if asked is None:
        return None
    if asked != "latest":
        if not is_complete(Path(asked), ranks):
            raise InputError(f"{asked}: no complete checkpoint of {ranks} ranks here")
        return asked
    numbered = [folder for folder in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", folder.name)]
    complete = [folder for folder in numbered if is_complete(folder, ranks)]
    if not complete:
        raise InputError(f"{output_dir}: no complete checkpoint of {ranks} ranks to resume from")
    return str(max(complete, key=lambda folder: int(folder.name.split("-")[1])))


def is_complete(folder: Path, ranks: int) -> bool:
    """Whether a run was not interrupted while it wrote this checkpoint.

    The first rank writes the Trainer's state last, but does not wait for the others' random states. What torch writes
    is a zip file, whose table of contents comes at its end.
    """
    random_states = [f"rng_state_{rank}.pth" for rank in range(ranks)] if ranks > 1 else ["rng_state.pth"]
    if not all((folder / name).is_file() for name in (TRAINER_STATE_NAME, *random_states)):
        return False
    return all(zipfile.is_zipfile(file) for file in folder.rglob("*.pt*") if file.suffix in (".pt", ".pth"))
