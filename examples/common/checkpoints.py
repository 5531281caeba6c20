"""Which checkpoint to resume from."""

import re
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from .errors import InputError


def find_checkpoint(asked: str | None, output_dir: Path) -> str | None:
    """The checkpoint to resume from: ``asked`` is a path, ``latest`` in ``output_dir``, or None.

    The Trainer writes its state last: a folder without it was left by an interrupted run and does
    not count.

    Raises:
        InputError: no complete checkpoint there.
    """
    if asked is None:
        return None
    if asked != "latest":
        if not (Path(asked) / TRAINER_STATE_NAME).is_file():
            raise InputError(f"{asked}: no complete checkpoint here")
        return asked
    complete = [state.parent for state in output_dir.glob(f"checkpoint-*/{TRAINER_STATE_NAME}")]
    numbered = [folder for folder in complete if re.fullmatch(r"checkpoint-\d+", folder.name)]
    if not numbered:
        raise InputError(f"{output_dir}: no complete checkpoint to resume from")
    return str(max(numbered, key=lambda folder: int(folder.name.split("-")[1])))
