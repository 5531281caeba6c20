"""Statistics know placements and nothing else: copies, divisors, spread experts and gradients that come in parts.

Every case is compared with the same micro-gradients in one process. Ranks are played one after the other: each says
what it gives to the all-reduce, then each gets the sum.
"""

import pytest
import torch
from pytest import approx
from torch import nn

from ds_lena.grad_stats import statistics
from ds_lena.grad_stats.hooks import GradientHooks
from ds_lena.grad_stats.placement import Placement, data_parallel
from ds_lena.grad_stats.statistics import GradientStatistics
from ds_lena.layouts.plain import PlainLayout

CPU = torch.device("cpu")
PASSES = 3


class Rank:
    """One rank's local gradients: `local[p][i]` is what the hook of parameter i sees in pass p."""

    def __init__(self, placements, local, mean_pieces, layer_of=None):
        self.placements, self.mean_pieces = placements, mean_pieces
        self.layer_of = range(len(placements)) if layer_of is None else layer_of
        parameters = [nn.Parameter(torch.zeros_like(h)) for h in local[0]]
        self.hooks = GradientHooks(parameters, [p.name for p in placements])
        self.hooks.watch([True] * len(parameters), [p.join for p in placements])
        for gradients in local:
            sum((p * h).sum() for p, h in zip(parameters, gradients, strict=True)).backward()


def reduced(monkeypatch, ranks, loss_scale=1.0):
    """What every rank gets, one (Measurement, squared norm) each."""
    monkeypatch.setattr(statistics, "world_size", lambda group: len(ranks))
    given = []

    def run(rank):
        spreads = [placement.spread for placement in rank.placements]
        cells = set(zip(rank.layer_of, spreads, strict=True))
        layers = len(set(rank.layer_of))
        made = GradientStatistics(rank.placements, rank.layer_of, layers, cells, "all ranks", CPU)
        squares = torch.stack([piece.double().square().sum() for piece in rank.mean_pieces])
        return made.of(made.reduced(rank.hooks.passes, rank.hooks.sums, squares, squares), loss_scale)

    monkeypatch.setattr(statistics, "sum_over", lambda buffer, group: given.append(buffer) or buffer)
    for rank in ranks:
        run(rank)
    monkeypatch.setattr(statistics, "sum_over", lambda buffer, group: torch.stack(given).sum(0))
    return [run(rank) for rank in ranks]


def numbers(count, *shape, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def truth(micro_gradients):
    """A and B of micro-gradients (n, …)."""
    flat = micro_gradients.flatten(1)
    return flat.square().sum(1).mean().item(), flat.mean(0).square().sum().item()


def seen(measured, layer=0):
    return measured.mean_square[layer].item(), measured.square_of_mean[layer].item()


@pytest.mark.parametrize("world", [2, 3])
def test_data_parallel(monkeypatch, world):
    g = numbers(world * PASSES, 6)
    n, mean = len(g), g.mean(0)
    sizes = [PASSES - 1, PASSES + 1, PASSES][:world]
    ranks = [
        Rank(data_parallel(["w"], [torch.Size([6])], world), [[h * world / n] for h in mine], [piece])
        for mine, piece in zip(g.split(sizes), mean.chunk(world), strict=True)
    ]
    for measured, whole in reduced(monkeypatch, ranks):
        assert measured.n == n, "the passes of all ranks, which may differ"
        assert seen(measured) == approx(truth(g))
        assert whole.item() == approx(truth(g)[1])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_in_ddp_one_rank_measures_each_averaged_gradient(world):
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(5)]
    for parameter in parameters[:4]:
        parameter.grad = torch.ones(2)
    shares = [[i for i, _ in PlainLayout(parameters, rank, world).gradients()] for rank in range(world)]
    assert sorted(i for share in shares for i in share) == [0, 1, 2, 3]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_loss_scale_is_taken_out(monkeypatch):
    g = numbers(PASSES, 4)
    rank = Rank(data_parallel(["w"], [torch.Size([4])], 1), [[h * 128 / PASSES] for h in g], [g.mean(0) * 128])
    ((measured, whole),) = reduced(monkeypatch, [rank], loss_scale=128.0)
    assert measured.n == PASSES
    assert (seen(measured), whole.item()) == (approx(truth(g)), approx(truth(g)[1]))


def test_tensor_parallel_parts_add_up_and_copies_count_once(monkeypatch):
    """Two ranks hold halves of `split` and copies of `norm`. They work on the same micro-batches."""
    split, norm = numbers(PASSES, 4), numbers(PASSES, 3, seed=1)
    shapes = {"split": torch.Size([4]), "norm": torch.Size([3])}
    ranks = []
    for r in range(2):
        half = slice(2 * r, 2 * r + 2)
        ranks.append(
            Rank(
                [Placement("split", shapes["split"]), Placement("norm", shapes["norm"], counted=r == 0)],
                [[s[half] / PASSES, m / PASSES] for s, m in zip(split, norm, strict=True)],
                [split.mean(0)[half], norm.mean(0)],
            )
        )
    for measured, whole in reduced(monkeypatch, ranks):
        assert measured.n == PASSES, "passes of ranks that share a micro-batch count once"
        assert (seen(measured, 0), seen(measured, 1)) == (approx(truth(split)), approx(truth(norm)))
        assert whole.item() == approx(truth(split)[1] + truth(norm)[1])


def test_a_wrapper_that_divides_by_more_ranks_than_there_are_replicas(monkeypatch):
    """Ulysses at ZeRO 3: two ranks share each micro-batch, and the wrapper divides by both."""
    g = numbers(PASSES, 4)
    placement = Placement("w", torch.Size([4]), replicas=1, divisor=2)
    ranks = [
        Rank([placement], [[torch.cat((h[:2], 0 * h[2:]) if r == 0 else (0 * h[:2], h[2:]))] for h in g], [mean])
        for r, mean in enumerate((g.sum(0)[:2] / 2, g.sum(0)[2:] / 2))
    ]
    scaled = g * PASSES / 2  # micro-gradients whose mean is what the wrapper averages to
    for measured, _ in reduced(monkeypatch, ranks):
        assert measured.n == PASSES
        assert seen(measured) == approx(truth(scaled))


def test_a_gradient_that_comes_in_parts_is_completed_before_it_is_squared(monkeypatch):
    """The hook sees one part of each micro-gradient, the other rank's part is added by the join; one rank counts."""
    parts = [numbers(PASSES, 4), numbers(PASSES, 4, seed=1)]
    whole = parts[0] + parts[1]
    ranks = []
    for r in range(2):
        others = iter(parts[1 - r])
        join = (lambda h, others=others: h + next(others) / PASSES) if r == 0 else lambda h: None
        placement = Placement("norm", torch.Size([4]), counted=r == 0, join=join)
        ranks.append(Rank([placement], [[h / PASSES] for h in parts[r]], [whole.mean(0)]))
    for measured, _ in reduced(monkeypatch, ranks):
        assert seen(measured) == approx(truth(whole))


@pytest.mark.parametrize("one_layer", [False, True], ids=["a layer each", "one layer"])
def test_experts_show_the_noise_and_signal_of_a_dense_layer(monkeypatch, one_layer):
    """Four ranks in two expert-parallel pairs. A micro-gradient of the expert is the mean over a pair's micro-batches.

    Noise and signal are what both kinds of layers must agree on: here the expert's micro-batches are those of `dense`.
    """
    g = numbers(4 * PASSES, 5).view(4, PASSES, 5)
    n = 4 * PASSES
    of_pair = (g[:2].sum(0), g[2:].sum(0))  # what a pair's hook sees, before division
    ranks = []
    for r in range(4):
        placements = [
            Placement("dense", torch.Size([5]), replicas=4, divisor=4),
            Placement("expert", torch.Size([5]), replicas=2, spread=2, divisor=4),
        ]
        expert = of_pair[r // 2] if r % 2 == 0 else torch.zeros(PASSES, 5, dtype=torch.float64)
        # The other rank of the pair holds another expert. Here it is given none, so that one expert is looked at.
        counted = Placement("expert", torch.Size([5]), replicas=2, spread=2, divisor=4, counted=r % 2 == 0)
        local = [[g[r, p] * 4 / n, expert[p] * 4 / n] for p in range(PASSES)]
        mean = g.flatten(0, 1).mean(0)
        pieces = [mean if r == 0 else 0 * mean, mean if r == 0 else 0 * mean]
        ranks.append(Rank([placements[0], counted], local, pieces, [0, 0] if one_layer else [0, 1]))

    a, b = truth(g.flatten(0, 1))
    pairs = torch.cat((of_pair[0], of_pair[1])) / 2
    a_pairs, b_pairs = truth(pairs)
    assert b_pairs == approx(b)
    dense_like = b + (n - 1) / (n / 2 - 1) * (a_pairs - b)
    wanted = [(a + dense_like, 2 * b)] if one_layer else [(a, b), (dense_like, b)]
    for measured, _ in reduced(monkeypatch, ranks):
        assert measured.n == n
        for layer, statistic in enumerate(wanted):
            assert seen(measured, layer) == approx(statistic)
        assert measured.micro_gradients.tolist() == ([n / 2] if one_layer else [n, n / 2])
        assert measured.has_noise.all()


def test_an_expert_with_one_micro_gradient_has_no_noise(monkeypatch):
    placement = Placement("expert", torch.Size([2]), replicas=1, spread=2, divisor=2)
    ranks = [Rank([placement], [[torch.ones(2)]], [torch.ones(2)]) for _ in range(2)]
    for measured, _ in reduced(monkeypatch, ranks):
        assert measured.n == 2
        assert measured.seen.all() and not measured.has_noise.any()


def test_placements_that_contradict_each_other_are_an_error():
    placements = [Placement("a", torch.Size([1])), Placement("b", torch.Size([1]), replicas=2)]
    with pytest.raises(ValueError, match="disagree"):
        GradientStatistics(placements, [0, 1], 2, {(0, 1), (1, 1)}, None, CPU)
