"""What LENA remembers in a checkpoint. It needs torch, and neither DeepSpeed nor the model.

    python -m ds_lena.inspect outputs/run

A checkpoint is a folder of DeepSpeed checkpoints, the folder of one of them, or a file by `torch.save` that holds the
`state_dict()` of a LENA. Files are read by torch's safe loader, which executes nothing: an object of a package is
replaced by an empty one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from .alike import alike_in, require_alike
from .errors import LenaError, StateError
from .layouts.pieces import Pieces, pieces_from, require_inside
from .saved_files import SAVE, all_files_in, latest_tag, read, stage_of
from .schedule.checkpoint import require_groups, require_whole

_DEEPEST = 4  # dictionaries around LENA's state: the user's, a file's, a wrapper's, the optimizer's
_OF_RANK = "pieces"  # the one entry that differs between the files of a checkpoint
_COLUMNS = ("gain", "warmup", "noise", "signal", "noise_scale", "progress")


def inspect(path: str | Path) -> dict[str, Any]:
    """LENA's part of a checkpoint, as plain numbers.

    Returns:
        A dictionary:

        - `path`: the folder or the file that was read. `files`: by name, the flat `tensors` of this file that an
          engine has cut into pieces, their `elements`, and the `parameters` that these belong to; 0 without an engine.
        - `saved_by`: `deepspeed` (its version), `zero_stage`, `ranks` (over which gradients were averaged), where the
          files say so.
        - `lena`: `version`, `variant`, `base`, `update`, `n`, `skipped`, `nonfinite`, and the clock's numbers.
        - `layers`: by layer name, `gain`, `warmup`, `progress` (the training state S), `noise`, `signal`, `noise_scale`
          in micro-batches. None where nothing is known yet, and of the variant "authors-code", which averages others.

    Raises:
        StateError: there is no checkpoint, a file is missing or cannot be read, a state is damaged, or files disagree.
    """
    models, files = _files(Path(path))
    found: dict[str, dict[str, Any]] = {}
    alike: dict[str, dict[Path, dict[str, Any]]] = {}
    saved_by: dict[str, Any] = {}
    for model in models.values():
        saved_by |= _origin(model)
    for file in files:
        content = read(file)
        saved_by |= _origin(content)
        holders = list(_holders(content))
        if len(holders) > 1:
            raise StateError(
                f"LENA: {file} holds {len(holders)} states of LENA, of several optimizers. Save each apart."
            )
        for holder in holders:
            found[file.name] = _checked(file, holder, is_of_engine=bool(models) or "ds_version" in content)
            if models:
                part = file.name[file.name.index("mp_rank_") :]  # those of a pipeline's stages are their own
                alike.setdefault(part, {})[file] = _alike(file, holder)
    if not found:
        raise StateError(
            f"LENA: {path} holds no state of LENA. Was it saved by another optimizer? Read were: "
            f"{', '.join(file.name for file in files[:4])}{', …' if len(files) > 4 else ''}."
        )
    without = [file for file in files if file.name not in found]
    if without:
        raise StateError(
            f"LENA: {without[0]} holds no state of LENA, and {next(iter(found))} does. Restore it, or inspect an "
            "earlier checkpoint."
        )
    state = _same(found)
    for of_part in alike.values():
        require_alike(of_part)
    for file, model in models.items():
        if model.get(SAVE) != state.get("save"):
            raise StateError(
                f"LENA: {file} and the files with the optimizer's state are of different saves. A run was killed while "
                "it overwrote an older checkpoint, perhaps. Inspect another checkpoint."
            )
    return {
        "path": str(files[0].parent if models else files[0]),
        "files": {name: _counted(pieces_from(one.get(_OF_RANK, []))) for name, one in found.items()},
        "saved_by": saved_by,
        "lena": {key: value for key, value in state.items() if key != "layers"},
        "layers": {name: _layer(layer, state["variant"]) for name, layer in state["layers"].items()},
    }


def _files(path: Path) -> tuple[dict[Path, Mapping[str, Any]], list[Path]]:
    """What the model files hold, none for a single file; and the files that hold an optimizer's state."""
    if path.is_file():
        return {}, [path]
    if not path.is_dir():
        raise StateError(f"LENA: there is no {path}. Give the folder of a checkpoint, or a file by torch.save.")
    tag = latest_tag(path)
    if tag is not None and not (path / tag).is_dir():
        raise StateError(f'LENA: {path / "latest"} names "{tag}", which is not there. Give the folder itself.')
    path = path / (tag or "")
    if not any(path.glob("*model_states.pt")) and not any(path.glob("*optim_states.pt")):
        hint = " Of torch.distributed.checkpoint's folders nothing is read." if (path / ".metadata").exists() else ""
        raise StateError(
            f"LENA: {path} holds no checkpoint of DeepSpeed: neither latest, nor *_model_states.pt, nor "
            f"*_optim_states.pt.{hint}"
        )
    return all_files_in(path)


def _holders(content: Any, depth: int = 0) -> Iterator[Mapping[str, Any]]:
    """The dictionaries in nested dictionaries that hold a state of LENA, as an optimizer's `state_dict()` does."""
    if not isinstance(content, Mapping) or depth > _DEEPEST:
        return
    if isinstance(content.get("lena"), dict):
        yield content
    for key, value in content.items():
        if key != "lena":
            yield from _holders(value, depth + 1)


def _checked(file: Path, holder: Mapping[str, Any], is_of_engine: bool) -> dict[str, Any]:
    """LENA's state in a file, checked. An engine adds which pieces of the parameters the file's tensors hold."""
    try:
        state = require_whole(holder["lena"])
        if is_of_engine:
            require_groups(holder.get("param_groups"), state["base"])
    except StateError as error:
        raise StateError(f"{error} The file is {file}.") from error
    if is_of_engine and state["version"] > 1 and _OF_RANK not in state:
        raise StateError(
            f'LENA: the state in {file} is damaged: "{_OF_RANK}" is nothing, and an engine writes it. Restore the '
            "file, or inspect an earlier checkpoint."
        )
    try:
        pieces = pieces_from(state.get(_OF_RANK, []))
        if _OF_RANK in state:
            require_inside(pieces, _sizes(holder))
    except ValueError as error:
        raise StateError(
            f'LENA: the state in {file} is damaged: in "{_OF_RANK}" {error}. Restore the file, or inspect an earlier '
            "checkpoint."
        ) from error
    return state


def _alike(file: Path, holder: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters and counts that all ranks have to go on with."""
    try:
        return alike_in(holder["param_groups"], holder["state"], holder["lena"]["base"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StateError(
            f"LENA: the base rule's state in {file} is damaged: {error!r}. Restore the file, or inspect an earlier "
            "checkpoint."
        ) from error


def _sizes(holder: Mapping[str, Any]) -> list[int | None]:
    """The elements of each tensor of an optimizer, as far as the base rule's state shows them.

    Raises:
        ValueError: the optimizer's part is in another form.
    """
    try:
        numbers = [number for group in holder["param_groups"] for number in group["params"]]
        states = [holder["state"].get(number, {}).items() for number in numbers]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f'nothing can be looked up: "param_groups" or "state" is damaged ({error!r})') from error
    of_tensors = [[v.numel() for key, v in state if key != "step" and isinstance(v, Tensor)] for state in states]
    return [min(sizes, default=0) or None for sizes in of_tensors]


def _origin(content: Any) -> dict[str, Any]:
    """What the files of DeepSpeed say of the engine that saved them."""
    if not isinstance(content, Mapping):
        return {}
    known = {
        "deepspeed": content.get("ds_version"),
        "zero_stage": stage_of(content),
        "ranks": content.get("dp_world_size"),
    }
    return {key: value for key, value in known.items() if value is not None}


def _same(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The state that all files hold."""
    shared = {name: {key: value for key, value in state.items() if key != _OF_RANK} for name, state in found.items()}
    (first, state), *others = shared.items()
    for name, other in others:
        keys = [key for key in state.keys() | other.keys() if state.get(key) != other.get(key)]
        if keys:
            raise StateError(
                f'LENA: {first} and {name} hold other states of LENA ("{min(keys)}" differs): they are of two saves, '
                "or one is damaged. No rank can go on from them. Restore the files of one save."
            )
    return state


def _counted(pieces: Pieces) -> dict[str, int]:
    return {
        "tensors": len(pieces),
        "elements": sum(piece.length for tensor in pieces for piece in tensor),
        "parameters": len({piece.name for tensor in pieces for piece in tensor}),
    }


def _layer(layer: Mapping[str, Any], variant: str) -> dict[str, Any]:
    """One layer's numbers, with noise and signal of their moving averages."""
    noise = signal = scale = None
    if variant == "default" and layer["weight"] > 0:
        noise, signal = (value / layer["weight"] for value in layer["averages"])
        scale = noise / signal if signal > 0 else None
    known = {"gain": layer["gain"], "warmup": layer["warmup"], "progress": layer["progress"]}
    return known | {"noise": noise, "signal": signal, "noise_scale": scale}


def as_text(found: Mapping[str, Any]) -> str:
    """For a reader: what was saved, and a table of the layers."""
    state, files = found["lena"], found["files"]
    origin = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in found["saved_by"].items())
    lines = [
        found["path"],
        f"{len(files)} file{'s' if len(files) > 1 else ''} with LENA's state{': ' if origin else ''}{origin}",
        ", ".join(f"{key} {value}" for key, value in state.items() if not isinstance(value, dict)),
    ]
    cut = {name: one for name, one in files.items() if one["tensors"]}
    if cut:
        lines.append("")
    for name, one in cut.items():
        lines.append(
            f"{name}: {one['elements']:,} elements of {one['parameters']} parameters in {one['tensors']} flat tensors"
        )
    width = max([len("layer"), *map(len, found["layers"])])
    lines += ["", f"{'layer':<{width}}" + "".join(f"{name:>13}" for name in _COLUMNS)]
    for name, layer in found["layers"].items():
        cells = ("–" if layer[key] is None else f"{layer[key]:.5g}" for key in _COLUMNS)
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>13}" for cell in cells))
    return "\n".join(lines)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"LENA: {message}. See {self.prog} --help.\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what a checkpoint holds. 2 if it holds nothing that can be read."""
    parser = _Parser(prog="python -m ds_lena.inspect", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("path", help="a folder of DeepSpeed checkpoints, the folder of one, or a file by torch.save")
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    given = parser.parse_args(arguments)
    try:
        found = inspect(given.path)
    except LenaError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write((json.dumps(found, indent=1) if given.json else as_text(found)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
