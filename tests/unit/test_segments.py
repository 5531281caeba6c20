"""How a flat tensor of many parameters' pieces and padding is cut for the update, and measured."""

import torch

from ds_lena.layouts.layout import Segment
from ds_lena.update.segments import Batch, Cut, cut_flat


def lay_out(*lengths):
    """Segments of parameters 0, 1, … one behind the other."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [Segment(i, start, length, offset=0) for i, (start, length) in enumerate(zip(starts, lengths, strict=True))]


def test_a_tensor_that_is_one_parameter_stays_whole_and_in_its_shape():
    cut = cut_flat(6, lay_out(6), rates=[0], decays=[True])
    assert cut == Cut(sizes=(6,), batches=(Batch(rate=0, decays=True, pieces=(0,)),))
    tensor = torch.zeros(2, 3)
    assert cut.split(tensor)[0] is tensor


def test_each_layer_is_a_part_of_its_own():
    cut = cut_flat(10, lay_out(6, 4), rates=[0, 1], decays=[True, True])
    assert cut.sizes == (6, 4)
    assert cut.batches == (Batch(0, True, (0,)), Batch(1, True, (1,)))


def test_neighbours_of_one_layer_are_merged():
    cut = cut_flat(12, lay_out(4, 2, 6), rates=[0, 0, 1], decays=[True] * 3)
    assert cut.sizes == (6, 6)


def test_neighbours_of_one_layer_with_and_without_decay_are_not_merged():
    cut = cut_flat(6, lay_out(4, 2), rates=[0, 0], decays=[True, False])
    assert cut.sizes == (4, 2)
    assert cut.batches == (Batch(0, True, (0,)), Batch(0, False, (1,)))


def test_parts_of_one_layer_that_lie_apart_move_together():
    cut = cut_flat(9, lay_out(2, 3, 4), rates=[0, 1, 0], decays=[True] * 3)
    assert cut.sizes == (2, 3, 4)
    assert cut.batches == (Batch(0, True, (0, 2)), Batch(1, True, (1,)))


def test_padding_at_the_start_between_and_at_the_end_moves_with_nothing():
    segments = [Segment(0, start=1, length=2, offset=0), Segment(1, start=5, length=3, offset=7)]
    cut = cut_flat(10, segments, rates=[0, 1], decays=[True, True])
    assert cut.sizes == (1, 2, 2, 3, 2)
    assert cut.batches == (Batch(0, True, (1,)), Batch(1, True, (3,)))


def test_padding_parts_neighbours_of_one_layer():
    segments = [Segment(0, start=0, length=2, offset=0), Segment(1, start=3, length=2, offset=0)]
    cut = cut_flat(5, segments, rates=[0, 0], decays=[True, True])
    assert cut.sizes == (2, 1, 2)
    assert cut.batches == (Batch(0, True, (0, 2)),)


def test_a_tensor_of_padding_alone_moves_nothing():
    assert cut_flat(4, [], rates=[0], decays=[True]) == Cut(sizes=(4,), batches=())


def test_the_parts_are_views():
    tensor = torch.zeros(6)
    cut_flat(6, lay_out(4, 2), rates=[0, 1], decays=[True, True]).split(tensor)[1].fill_(1)
    assert tensor.tolist() == [0, 0, 0, 0, 1, 1]
