"""What is copied from saved tensors to live ones, on lists of numbers in place of tensors."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_lena.errors import StateError
from ds_lena.layouts.pieces import Copy, Piece, copies, pieces_from, require_inside

SIZES = {"a": 6, "b": 3}


def test_a_tensor_is_filled_from_two_files():
    saved = {"0": [[Piece("a", 0, 4, 0)]], "1": [[Piece("a", 0, 2, 4), Piece("b", 2, 3, 0)]]}
    plan = copies([[Piece("a", 10, 3, 2), Piece("b", 13, 2, 1)]], saved, SIZES)
    assert plan == {"0": [Copy("a", 0, 2, 0, 10, 2)], "1": [Copy("a", 0, 0, 0, 12, 1), Copy("b", 0, 3, 0, 13, 2)]}


@st.composite
def cuts(draw):
    """A layout over some ranks: per rank one tensor, with padding between the pieces, in any order."""
    pieces = []
    for name, size in SIZES.items():
        borders = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=3))})
        pieces += [(name, begin, end - begin) for begin, end in itertools.pairwise(borders)]
    ranks = [[] for _ in range(draw(st.integers(1, 3)))]
    position = [0] * len(ranks)
    for name, offset, length in draw(st.permutations(pieces)):
        rank = draw(st.integers(0, len(ranks) - 1))
        start = position[rank] + draw(st.integers(0, 2))
        ranks[rank].append(Piece(name, start, length, offset))
        position[rank] = start + length
    return ranks


@given(cuts(), cuts())
def test_any_layout_goes_to_any_other(old, new):
    files = {}
    for rank, pieces in enumerate(old):
        files[str(rank)] = {p.start + i: (p.name, p.offset + i) for p in pieces for i in range(p.length)}
    for pieces in new:
        filled = {}
        for file, plan in copies([pieces], {str(r): [p] for r, p in enumerate(old)}, SIZES).items():
            for copy in plan:
                filled |= {copy.start + i: files[file][copy.begin + i] for i in range(copy.length)}
        assert filled == {p.start + i: (p.name, p.offset + i) for p in pieces for i in range(p.length)}


WHOLE = [[Piece("a", 0, 6, 0)]]


@pytest.mark.parametrize(
    ("saved", "told"),
    [
        ({"x.pt": [[Piece("a", 0, 4, 0)]]}, ["elements 4 to 6", '"a"', "x.pt"]),
        ({"x.pt": [[Piece("a", 0, 2, 0)]], "y.pt": [[Piece("a", 0, 2, 4)]]}, ["elements 2 to 6", '"a"']),
        ({"x.pt": [[Piece("a", 0, 4, 0)]], "y.pt": [[Piece("a", 0, 3, 3)]]}, ["3 to 4", "twice", "x.pt", "y.pt"]),
        ({"x.pt": [[Piece("c", 0, 4, 0)]]}, ['"c"', "does not train", "x.pt"]),
        ({"x.pt": [[Piece("a", 0, 7, 0)]]}, ['"a"', "6 elements", "x.pt"]),
        ({"x.pt": []}, ["elements 0 to 6", '"a"', "x.pt"]),
    ],
)
def test_what_does_not_cover_the_model_is_refused_by_name(saved, told):
    with pytest.raises(StateError) as raised:
        copies(WHOLE, saved, SIZES)
    assert all(text in str(raised.value) for text in told)


@pytest.mark.parametrize(
    "saved",
    [None, "text", [1], [[1]], [[["a", 0, 1]]], [[["a", 0, 0, 0]]], [[["a", -1, 1, 0]]], [[["a", 0.5, 1, 0]]],
     [[[1, 0, 1, 0]]]],
)  # fmt: skip
def test_a_map_in_another_form_is_not_read(saved):
    with pytest.raises(ValueError):
        pieces_from(saved)


def test_a_map_is_read():
    assert pieces_from([[["a", 1, 2, 3]], []]) == [[Piece("a", 1, 2, 3)], []]


def test_pieces_that_lie_in_their_tensors_are_right():
    require_inside([[Piece("b", 4, 3, 0), Piece("a", 0, 4, 2)], [], [Piece("a", 0, 2, 0)]], [7, 5, None])


@pytest.mark.parametrize(
    ("pieces", "sizes", "told"),
    [
        ([[], []], [3], "is of 2 tensors, and there are 1"),
        ([[]], [3, 3], "is of 1 tensors, and there are 2"),
        ([[Piece("a", 2, 2, 0)]], [3], '"a" is at elements 2 to 4 of tensor 0, which has 3 elements'),
        (
            [[], [Piece("b", 3, 2, 0), Piece("a", 0, 4, 0)]],
            [9, None],
            '"b" is at elements 3 to 5 of tensor 1, where "a"',
        ),
    ],
)
def test_pieces_outside_their_tensors_are_told(pieces, sizes, told):
    with pytest.raises(ValueError) as raised:
        require_inside(pieces, sizes)
    assert told in str(raised.value)
