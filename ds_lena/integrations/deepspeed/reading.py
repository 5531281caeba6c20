"""Reads the files of a checkpoint and checks them: whole, of one save, and with all that is to be copied from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...config import LenaConfig
from ...errors import StateError
from ...layouts.pieces import Copy, Piece, pieces_from
from ...schedule import checkpoint
from ._internals import saved
from ._internals.saved import reading


@dataclass(frozen=True)
class Content:
    """What one optimizer file holds. `pieces`: in each of its tensors, None if nobody has written them down.

    `has_lena`: it has LENA's state. `group_of`: the parameter group of each name. `keys`: the names in the base rule's
    state. `digest`: of LENA's state.
    """

    pieces: list[list[Piece]] | None
    has_lena: bool
    group_of: dict[str, int]
    keys: set[str]
    digest: str


def shard_at(path: Path, model: Mapping[str, Any]) -> saved.Shard:
    """The optimizer's part of a file. `model`: the content of its model file."""
    return reading(path, lambda: saved.optimizer_in(saved.read_file(path), saved.weights_in(model)))


def content_of(path: Path, shard: saved.Shard, config: LenaConfig) -> Content:
    """What is in an optimizer file.

    Raises:
        StateError: it is damaged, or LENA cannot go on from it with these keys.
    """
    lena = shard.inner.get("lena")
    keys = reading(path, lambda: saved.state_keys(shard))
    if not isinstance(lena, dict):
        return Content(None, False, {}, keys, "")
    try:
        checkpoint.require_loadable(lena, config)
    except StateError as error:
        raise StateError(f"{error} The file is {path}.") from error
    has_map = lena["version"] > 1
    pieces = reading(path, lambda: pieces_from(lena["pieces"])) if has_map else None
    group_of = reading(path, lambda: groups_of(shard.inner["param_groups"], pieces or []))
    own = {key: value for key, value in lena.items() if key != "pieces"}
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
    return Content(pieces, True, group_of, keys, digest)


def groups_of(groups: list[dict[str, Any]], pieces: list[list[Piece]]) -> dict[str, int]:
    """The number of the parameter group of each parameter. `pieces`: in the tensors of the groups, by their number."""
    group_of = {number: i for i, group in enumerate(groups) for number in group["params"]}
    return {piece.name: group_of[number] for number, held in enumerate(pieces) for piece in held}


def require_one_save(contents: Mapping[Path, Content]) -> None:
    """Raise `StateError` if LENA's state is not the same in all files, or not in all of them."""
    first, known = next(iter(contents.items()))
    for path, content in contents.items():
        if content.has_lena != known.has_lena:
            lacking = path if known.has_lena else first
            raise StateError(f"LENA: {lacking} holds no LENA state. Restore it, or load an earlier checkpoint.")
        if content.digest != known.digest:
            raise StateError(
                f"LENA: {path} and {first} are of different saves: LENA's state in them differs. Restore the one that "
                "was replaced, or load an earlier checkpoint."
            )


def require_there(path: Path, shard: saved.Shard, wanted: list[Copy], keys: set[str], has_masters: bool = True) -> None:
    """Raise `StateError` if a file lacks something of what is to be copied from it.

    `keys`: the names in the base rule's state. `has_masters`: the master weights are in the file too.
    """
    for copy in wanted:
        state = shard.inner["state"].get(copy.source, {})
        lacking = sorted(keys - state.keys())
        if lacking and (state or not shard.may_lack_state):
            what = f'"{lacking[0]}"'
        elif has_masters and not _reaches(shard.masters[copy.source], copy):
            what = "the master weights"
        else:
            short = sorted(key for key, value in state.items() if key != "step" and not _reaches(value, copy))
            if not short:
                continue
            what = f'"{short[0]}"'
        raise StateError(f'LENA: {path} lacks {what} of "{copy.name}". Restore it, or load an earlier checkpoint.')


def _reaches(tensor: object, copy: Copy) -> bool:
    return isinstance(tensor, Tensor) and tensor.numel() >= copy.begin + copy.length
