"""Reads the files of a checkpoint and checks them: whole, of one save, and with all that is to be copied from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...alike import alike_in
from ...config import LenaConfig
from ...errors import StateError
from ...layouts.pieces import Copy, Piece, pieces_from, require_inside
from ...saved_files import SAVE
from ...schedule import checkpoint
from ...update.rules import RULES, Rule
from ._internals import saved
from ._internals.saved import reading
from .fitting import COUNTS


@dataclass(frozen=True)
class Content:
    """What one optimizer file holds. `pieces`: in each of its tensors, None if nobody has written them down.

    `has_lena`: it has LENA's state. `group_of`: the parameter group of each name. `keys`: the names in the base rule's
    state, of each tensor: those that there have to be, or of another optimizer those that there are. `alike`: what has
    to be the same in all files, by what an error calls it. `digest`: of LENA's state. `fits_model`: the model file
    beside it is of the same save.
    """

    pieces: list[list[Piece]] | None
    has_lena: bool
    group_of: dict[str, int]
    keys: dict[int, set[str]]
    alike: dict[str, Any]
    digest: str
    fits_model: bool


def shard_at(path: Path, model: Mapping[str, Any]) -> saved.Shard:
    """The optimizer's part of a file. `model`: the content of its model file."""
    return reading(path, lambda: saved.optimizer_in(saved.read_file(path), saved.weights_in(model)))


def content_of(path: Path, shard: saved.Shard, model: Mapping[str, Any], config: LenaConfig) -> Content:
    """What is in an optimizer file. `model`: the content of the model file that was saved with it.

    Raises:
        StateError: it is damaged, or LENA cannot go on from it with these keys.
    """
    lena: Any = shard.inner.get("lena")
    has_lena, pieces, group_of, digest = isinstance(lena, dict), None, {}, ""
    try:
        checkpoint.require_groups(shard.inner.get("param_groups"), config.base)
        if has_lena:
            checkpoint.require_loadable(lena, config)
    except StateError as error:
        raise StateError(f"{error} The file is {path}.") from error
    groups = shard.inner["param_groups"]
    keys = reading(path, lambda: _keys(shard, None if lena is None else RULES[config.base]))
    alike = reading(path, lambda: alike_in(groups, shard.inner["state"], config.base))
    alike |= {f'"{key}"': value for key, value in saved.own_entries(shard).items() if isinstance(value, (int, float))}
    alike |= {f'"{key}" of the model file': model.get(key) for key in COUNTS}
    if has_lena:
        if lena["version"] > 1:
            sizes = [None if master is None else master.numel() for master in shard.masters]
            pieces = reading(path, lambda: pieces_from(lena.get("pieces")))
            reading(path, lambda: require_inside(pieces, sizes))
            group_of = reading(path, lambda: groups_of(groups, pieces))
        own = {key: value for key, value in lena.items() if key != "pieces"}
        digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
    fits = (lena.get("save") if has_lena else None) == model.get(SAVE)
    return Content(pieces, has_lena, group_of, keys, alike, digest, fits)


def _keys(shard: saved.Shard, rule: Rule | None) -> dict[int, set[str]]:
    """The names in the state of each tensor, by its number: what the rule needs, or without one what any tensor has."""
    there = {key for state in shard.inner["state"].values() for key in state}
    return {
        number: there if rule is None else {*rule.buffers(group), "step"}
        for group in shard.inner["param_groups"]
        for number in group["params"]
    }


def groups_of(groups: list[dict[str, Any]], pieces: list[list[Piece]]) -> dict[str, int]:
    """The number of the parameter group of each parameter. `pieces`: in the tensors of the groups, by their number."""
    group_of = {number: i for i, group in enumerate(groups) for number in group["params"]}
    return {piece.name: group_of[number] for number, held in enumerate(pieces) for piece in held}


def require_one_save(contents: Mapping[Path, Content]) -> None:
    """Raise `StateError` if LENA's state is not the same in all files, or a model file is of another save."""
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
        if not content.fits_model:
            raise StateError(
                f"LENA: {path} and the model file beside it are of different saves. A run was killed while it "
                "overwrote an older checkpoint, perhaps. Load another one, and save each under a tag of its own."
            )


def require_there(
    path: Path,
    shard: saved.Shard,
    wanted: list[Copy],
    keys: Mapping[int, set[str]],
    largest: Mapping[int, int] | None = None,
    has_masters: bool = True,
) -> None:
    """Raise `StateError` if a file lacks something of what is to be copied from it.

    `keys`: the names in the base rule's state of each tensor, none without them. `largest`: the most elements that the
    state of a tensor may have, where that matters. `has_masters`: the master weights are in the file too.
    """
    for copy in wanted:
        state, end = shard.inner["state"].get(copy.source, {}), copy.begin + copy.length
        lacking = sorted(keys.get(copy.source, set()) - state.keys())
        names = [key for key in sorted(keys.get(copy.source, ())) if key in state and key != "step"]
        wrong = [
            key for key in names if not end <= _size(state[key]) <= (largest or {}).get(copy.source, _size(state[key]))
        ]
        if lacking and (state or not shard.may_lack_state):
            what = f'"{lacking[0]}"'
        elif has_masters and _size(shard.masters[copy.source]) < end:
            what = "the master weights"
        elif wrong:
            what = f'"{wrong[0]}"'
        else:
            continue
        raise StateError(f'LENA: {path} lacks {what} of "{copy.name}". Restore it, or load an earlier checkpoint.')


def _size(tensor: object) -> int:
    """Its elements. 0 of what is no tensor of real numbers."""
    return tensor.numel() if isinstance(tensor, Tensor) and tensor.is_floating_point() else 0
