"""How a flat tensor of many parameters' pieces and padding is cut for the update, and measured."""

import torch

from ds_lena.shards import Batch, FlatPlan, Segment, plan_flat


def lay_out(*lengths):
    """Segments of parameters 0, 1, … one behind the other."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [Segment(i, start, length, offset=0) for i, (start, length) in enumerate(zip(starts, lengths, strict=True))]


def test_a_tensor_that_is_one_parameter_stays_whole_and_in_its_shape():
    plan = plan_flat(6, lay_out(6), rates=[0], decays=[True])
    assert plan == FlatPlan(sizes=(6,), batches=(Batch(rate=0, decays=True, pieces=(0,)),))
    tensor = torch.zeros(2, 3)
    assert plan.split(tensor)[0] is tensor


def test_each_layer_is_a_part_of_its_own():
    plan = plan_flat(10, lay_out(6, 4), rates=[0, 1], decays=[True, True])
    assert plan.sizes == (6, 4)
    assert plan.batches == (Batch(0, True, (0,)), Batch(1, True, (1,)))


def test_neighbours_of_one_layer_are_merged():
    plan = plan_flat(12, lay_out(4, 2, 6), rates=[0, 0, 1], decays=[True] * 3)
    assert plan.sizes == (6, 6)


def test_neighbours_of_one_layer_with_and_without_decay_are_not_merged():
    plan = plan_flat(6, lay_out(4, 2), rates=[0, 0], decays=[True, False])
    assert plan.sizes == (4, 2)
    assert plan.batches == (Batch(0, True, (0,)), Batch(0, False, (1,)))


def test_parts_of_one_layer_that_lie_apart_move_together():
    plan = plan_flat(9, lay_out(2, 3, 4), rates=[0, 1, 0], decays=[True] * 3)
    assert plan.sizes == (2, 3, 4)
    assert plan.batches == (Batch(0, True, (0, 2)), Batch(1, True, (1,)))


def test_padding_at_the_start_between_and_at_the_end_moves_with_nothing():
    segments = [Segment(0, start=1, length=2, offset=0), Segment(1, start=5, length=3, offset=7)]
    plan = plan_flat(10, segments, rates=[0, 1], decays=[True, True])
    assert plan.sizes == (1, 2, 2, 3, 2)
    assert plan.batches == (Batch(0, True, (1,)), Batch(1, True, (3,)))


def test_padding_parts_neighbours_of_one_layer():
    segments = [Segment(0, start=0, length=2, offset=0), Segment(1, start=3, length=2, offset=0)]
    plan = plan_flat(5, segments, rates=[0, 0], decays=[True, True])
    assert plan.sizes == (2, 1, 2)
    assert plan.batches == (Batch(0, True, (0, 2)),)


def test_a_tensor_of_padding_alone_moves_nothing():
    assert plan_flat(4, [], rates=[0], decays=[True]) == FlatPlan(sizes=(4,), batches=())


def test_excluded_parameters_move_with_the_entry_behind_the_last_layer():
    layers = 1
    plan = plan_flat(6, lay_out(4, 2), rates=[0, layers], decays=[True, True])
    assert [batch.rate for batch in plan.batches] == [0, layers]


def test_the_parts_are_views():
    tensor = torch.zeros(6)
    plan_flat(6, lay_out(4, 2), rates=[0, 1], decays=[True, True]).split(tensor)[1].fill_(1)
    assert tensor.tolist() == [0, 0, 0, 0, 1, 1]
