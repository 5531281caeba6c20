"""From the pieces of parameters in saved tensors to those in live ones: what is copied where.

Pure arithmetic on names and element counts. It knows no file format and no tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..errors import StateError


class Piece(NamedTuple):
    """A piece of the parameter `name` in a flat tensor. `start`: where it begins in the tensor. `offset`: where it
    begins in the parameter. All but `name` count elements.
    """

    name: str
    start: int
    length: int
    offset: int


Pieces = Sequence[Sequence[Piece]]
"""The pieces in each tensor of one rank, by the tensor's number."""


class Copy(NamedTuple):
    """`length` elements of parameter `name`, from position `begin` of saved tensor `source` to `start` of `target`."""

    name: str
    source: int
    begin: int
    target: int
    start: int
    length: int


def pieces_from(saved: object) -> list[list[Piece]]:
    """The pieces as a checkpoint holds them, `[[[name, start, length, offset], …], …]`.

    Raises:
        ValueError: they are in another form.
    """
    if not isinstance(saved, list) or not all(isinstance(tensor, list) for tensor in saved):
        raise ValueError("the map of pieces is not a list of lists")
    for entry in (entry for tensor in saved for entry in tensor):
        if not _is_piece(entry):
            raise ValueError(f"{entry!r} is not a piece [name, start, length, offset]")
    return [[Piece(*entry) for entry in tensor] for tensor in saved]


def _is_piece(entry: object) -> bool:
    if not isinstance(entry, (list, tuple)) or len(entry) != 4:
        return False
    name, *numbers = entry
    return isinstance(name, str) and all(type(n) is int and n >= 0 for n in numbers) and numbers[1] > 0


def require_inside(pieces: Pieces, sizes: Sequence[int | None]) -> None:
    """Check a file's pieces against its tensors. `sizes`: the number of elements of each tensor, None if not known.

    Raises:
        ValueError: there are pieces of more or fewer tensors, a piece lies outside its tensor, or two pieces overlap.
    """
    if len(pieces) != len(sizes):
        raise ValueError(f"the map of pieces is of {len(pieces)} tensors, and there are {len(sizes)}")
    for number, (tensor, size) in enumerate(zip(pieces, sizes, strict=True)):
        end, before = 0, ""
        for piece in sorted(tensor, key=lambda piece: piece.start):
            stop = piece.start + piece.length
            where = f'"{piece.name}" is at elements {piece.start} to {stop} of tensor {number}'
            if size is not None and stop > size:
                raise ValueError(f"{where}, which has {size} elements")
            if piece.start < end:
                raise ValueError(f'{where}, where "{before}" is too')
            end, before = stop, piece.name


def copies(own: Pieces, saved: Mapping[str, Pieces], sizes: Mapping[str, int]) -> dict[str, list[Copy]]:
    """What fills the pieces of `own`, by saved file.

    `saved`: the pieces in each file. `sizes`: the number of elements of every parameter of the model.

    Raises:
        StateError: a saved piece is of no parameter of the model, or does not fit it; or an element of an own piece is
            in none of the files, or in two places. It names the parameter and the file.
    """
    found: dict[str, list[tuple[Piece, str, int]]] = {}
    for file, tensors in saved.items():
        for number, tensor in enumerate(tensors):
            for piece in tensor:
                _require_fit(piece, file, sizes)
                found.setdefault(piece.name, []).append((piece, file, number))
    for held in found.values():
        held.sort(key=lambda entry: entry[0].offset)
    plan: dict[str, list[Copy]] = {file: [] for file in saved}
    for target, tensor in enumerate(own):
        for piece in tensor:
            for file, copy in _filling(piece, target, found.get(piece.name, []), saved):
                plan[file].append(copy)
    return plan


def _require_fit(piece: Piece, file: str, sizes: Mapping[str, int]) -> None:
    if piece.name not in sizes:
        raise StateError(
            f'LENA: {file} holds the parameter "{piece.name}", which this model does not train. Load the checkpoint '
            "into the model that it was saved of, with the same parameters frozen."
        )
    if piece.offset + piece.length > sizes[piece.name]:
        raise StateError(
            f'LENA: {file} holds elements {piece.offset} to {piece.offset + piece.length} of "{piece.name}", which has '
            f"{sizes[piece.name]} elements in this model. Load the checkpoint into the model that it was saved of."
        )


def _filling(
    piece: Piece, target: int, held: Sequence[tuple[Piece, str, int]], files: Mapping[str, Pieces]
) -> list[tuple[str, Copy]]:
    position, end, filling = piece.offset, piece.offset + piece.length, []
    last = ""
    for other, file, number in held:
        begin, stop = max(other.offset, piece.offset), min(other.offset + other.length, end)
        if begin >= stop:
            continue
        if begin > position:
            break
        if begin < position:
            raise StateError(
                f'LENA: elements {begin} to {min(position, stop)} of "{piece.name}" are in the checkpoint twice, in '
                f"{last} and in {file}. One of them belongs to another save: delete the files of the older one."
            )
        filling.append(
            (
                file,
                Copy(
                    piece.name,
                    number,
                    other.start + begin - other.offset,
                    target,
                    piece.start + begin - piece.offset,
                    stop - begin,
                ),
            )
        )
        position, last = stop, file
    if position < end:
        raise StateError(
            f'LENA: the checkpoint lacks elements {position} to {end} of "{piece.name}": they are in none of its files '
            f"({', '.join(files)}). Restore the file that is missing, or load an earlier checkpoint."
        )
    return filling
