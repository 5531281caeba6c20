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

import torch

from .errors import LenaError, StateError

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
        StateError: there is no checkpoint, a file cannot be read, or files disagree.
    """
    files = _files(Path(path))
    found: dict[str, dict[str, Any]] = {}
    saved_by: dict[str, Any] = {}
    for file in files:
        content = _read(file)
        saved_by |= _origin(content)
        states = list(_states(content))
        if len(states) > 1:
            raise StateError(
                f"LENA: {file} holds {len(states)} states of LENA, of several optimizers. Save each apart."
            )
        if states:
            found[file.name] = states[0]
    if not found:
        raise StateError(
            f"LENA: {path} holds no state of LENA. Was it saved by another optimizer? Read were: "
            f"{', '.join(file.name for file in files[:4])}{', …' if len(files) > 4 else ''}."
        )
    state = _same(found)
    return {
        "path": str(files[0].parent if len(files) > 1 else files[0]),
        "files": {name: _pieces(one.get(_OF_RANK) or []) for name, one in found.items()},
        "saved_by": saved_by,
        "lena": {key: value for key, value in state.items() if key != "layers"},
        "layers": {name: _layer(layer, state["variant"]) for name, layer in state["layers"].items()},
    }


def _files(path: Path) -> list[Path]:
    """The files that may hold LENA's state."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise StateError(f"LENA: there is no {path}. Give the folder of a checkpoint, or a file by torch.save.")
    latest = path / "latest"
    if latest.is_file():
        folder = path / latest.read_text().strip()
        if not folder.is_dir():
            raise StateError(f'LENA: {latest} names "{folder.name}", which is not there. Give the folder itself.')
        path = folder
    models, optimizers = sorted(path.glob("*model_states.pt")), sorted(path.glob("*optim_states.pt"))
    if not models and not optimizers:
        hint = " Of torch.distributed.checkpoint's folders nothing is read." if (path / ".metadata").exists() else ""
        raise StateError(
            f"LENA: {path} holds no checkpoint of DeepSpeed: neither latest, nor *_model_states.pt, nor "
            f"*_optim_states.pt.{hint}"
        )
    return models[:1] + optimizers  # at ZeRO 0 the optimizer's state is in the model's file


class _Empty:
    """Stands for an object of a package that is not needed. `given`: what it was made of."""

    def __new__(cls, *given: Any, **_: Any) -> _Empty:
        made = super().__new__(cls)
        made.given = given
        return made

    given: tuple[Any, ...]

    def __setstate__(self, state: Any) -> None:
        pass


def _read(file: Path) -> Any:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        with torch.serialization.safe_globals([(_Empty, name) for name in names]):
            return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # of pickle, zip and torch: many kinds, and all mean the same
        raise StateError(
            f"LENA: {file} cannot be read: {type(error).__name__}: {str(error).splitlines()[0][:200]}. It is damaged, "
            "or was not written by torch.save. Restore it, or inspect an earlier checkpoint."
        ) from error


def _states(content: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
    """All states of LENA in nested dictionaries."""
    if not isinstance(content, Mapping) or depth > _DEEPEST:
        return
    for key, value in content.items():
        if key == "lena" and isinstance(value, dict):
            yield value
        else:
            yield from _states(value, depth + 1)


def _origin(content: Any) -> dict[str, Any]:
    """What the files of DeepSpeed say of the engine that saved them."""
    if not isinstance(content, Mapping):
        return {}
    inner = content.get("optimizer_state_dict")
    stage = inner.get("zero_stage") if isinstance(inner, Mapping) else None
    stage = stage.given[0] if isinstance(stage, _Empty) and stage.given else stage  # an enum of DeepSpeed's
    known = {
        "deepspeed": content.get("ds_version"),
        "zero_stage": stage if isinstance(stage, int) else None,
        "ranks": content.get("dp_world_size"),
    }
    return {key: value for key, value in known.items() if value is not None}


def _same(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The state that all files hold."""
    shared = {name: {key: value for key, value in state.items() if key != _OF_RANK} for name, state in found.items()}
    (first, state), *others = shared.items()
    missing = {"version", "variant", "base", "update", "n", "layers"} - state.keys()
    if missing:
        raise StateError(f"LENA: the state in {first} is damaged: {', '.join(sorted(missing))} missing.")
    for name, other in others:
        keys = [key for key in state.keys() | other.keys() if state.get(key) != other.get(key)]
        if keys:
            raise StateError(
                f'LENA: {first} and {name} hold other states of LENA ("{min(keys)}" differs): they are of two saves, '
                "or one is damaged. No rank can go on from them. Restore the files of one save."
            )
    return state


def _pieces(tensors: Sequence[Sequence[Any]]) -> dict[str, int]:
    return {
        "tensors": len(tensors),
        "elements": sum(length for pieces in tensors for _, _, length, _ in pieces),
        "parameters": len({name for pieces in tensors for name, *_ in pieces}),
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
        ", ".join(f"{key} {value}" for key, value in state.items() if key != _OF_RANK),
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
