"""The Triton kernels, in Triton's interpreter on the CPU, against the rules in float64."""

import gc
import importlib
import logging
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed")

from ds_lena import LENA
from ds_lena.config import LenaConfig
from ds_lena.grad_stats.placement import data_parallel
from ds_lena.layouts.layout import Segment
from ds_lena.layouts.plain import PlainLayout
from ds_lena.optimizer import controller_of
from ds_lena.update.apply import Applier, Rates
from ds_lena.update.kernels import launch, table
from ds_lena.update.rules import RULES
from ds_lena.update.segments import cut_flat
from ds_lena.update.trust_ratio import TrustRatios

KEYS = {
    "adamw": {"betas": (0.8, 0.95), "eps": 1e-6},
    "lamb": {"betas": (0.8, 0.95), "eps": 1e-6},
    "sgd": {"momentum": 0.9, "nesterov": False},
    "sgd with nesterov": {"momentum": 0.9, "nesterov": True},
    "sgd without momentum": {"momentum": 0.0, "nesterov": False},
    "lars": {"momentum": 0.9},
    "lars without momentum": {"momentum": 0.0},
}
NARROW = {torch.float32: 3e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Kernels run on the CPU, and in small chunks."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(launch, "runs_on", lambda device: True)
    for name in ("apply", "trust_ratio"):
        monkeypatch.setattr(importlib.import_module(f"ds_lena.update.{name}"), "runs_on", lambda device: True)
    for module in (table, launch):
        monkeypatch.setattr(module, "BLOCK", 16)


class Run:
    """One rule on flat tensors: `sizes` of the pieces of each, each piece with a rate of its own."""

    def __init__(self, name, sizes, dtype, gaps=(), seed=0, unaligned=0, exact=False):
        self.rule, self.group = RULES[name.split()[0]], {"lr": 0.1, "weight_decay": 0.3, **KEYS[name]}
        generator = torch.Generator().manual_seed(seed)
        self.flats, self.cuts, self.factors = [], {}, []
        for number, pieces in enumerate(sizes):
            segments, at = [], 0
            for i, size in enumerate(pieces):
                at += (number + i) in gaps
                segments.append(Segment(len(self.factors), at, size, 0))
                self.factors.append(0.5 + (len(self.factors) % 7) / 4)
                at += size
            memory = torch.randn(at + unaligned, generator=generator).to(dtype)
            flat = (memory.double() if exact else memory)[unaligned:]
            flat.grad = torch.randn(at, generator=generator).to(dtype).to(flat.dtype)
            self.flats.append(flat)
            self.cuts[flat] = segments
        count = len(self.factors)
        decays = [i % 3 != 1 for i in range(count)]
        self.cuts = {f: cut_flat(f.numel(), s, range(count), decays) for f, s in self.cuts.items()}
        self.state = {flat: {} for flat in self.flats}
        self.generator, self.dtype = generator, dtype

    def update(self, applier):
        rates = Rates(torch.tensor(self.factors, dtype=torch.float64))
        applier.apply([{**self.group, "params": self.flats}], self.state, rates)
        for flat in self.flats:
            if flat.grad is not None:
                flat.grad = torch.randn(flat.numel(), generator=self.generator).to(self.dtype).to(flat.dtype)


def by_loop(run):
    """The applier that moves one tensor after the other."""
    applier = Applier(run.rule, run.cuts)
    applier._launcher = None
    return applier


def both(name, sizes, dtype, updates=3, **options):
    """The same run by the kernel, and by the rule's loop in float64."""
    ours, exact = Run(name, sizes, dtype, **options), Run(name, sizes, dtype, exact=True, **options)
    for run, applier in ((ours, Applier(ours.rule, ours.cuts)), (exact, by_loop(exact))):
        for _ in range(updates):
            run.update(applier)
    return ours, exact


def assert_equal(ours, exact, dtype):
    for one, other in zip(ours.flats, exact.flats, strict=True):
        close = {"rtol": NARROW[dtype], "atol": 4 * NARROW[dtype], "equal_nan": True}
        torch.testing.assert_close(one.double(), other, **close)
        assert ours.state[one].keys() == exact.state[other].keys()
        for key, value in ours.state[one].items():
            torch.testing.assert_close(value.double(), exact.state[other][key].double(), **close)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", KEYS)
def test_each_rule(name, dtype):
    ours, exact = both(name, [[5, 40, 1], [17]], dtype, gaps=(1,))
    assert_equal(ours, exact, dtype)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(
        st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 33]), min_size=1, max_size=6), min_size=1, max_size=3
    ),
    gaps=st.sets(st.integers(0, 6)),
    unaligned=st.integers(0, 3),
    name=st.sampled_from(sorted(KEYS)),
)
def test_any_pieces(sizes, gaps, unaligned, name):
    assert_equal(*both(name, sizes, torch.float32, updates=2, gaps=gaps, unaligned=unaligned), torch.float32)


def test_what_lies_between_the_pieces_stays():
    run = Run("adamw", [[3, 3]], torch.float32, gaps=(1,))
    between = run.flats[0][3].clone()
    run.update(Applier(run.rule, run.cuts))
    assert run.flats[0][3] == between
    assert run.state[run.flats[0]]["exp_avg"][3] == 0


def test_a_tensor_without_gradient_stays_and_is_not_counted():
    run = Run("adamw", [[20], [20]], torch.float32)
    before = run.flats[1].clone()
    run.flats[1].grad = None
    applier = Applier(run.rule, run.cuts)
    run.update(applier)
    assert torch.equal(run.flats[1], before)
    assert run.state[run.flats[1]] == {}
    run.flats[1].grad = torch.ones(20)
    run.update(applier)
    assert [float(run.state[flat]["step"]) for flat in run.flats] == [2, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_what_is_not_finite_passes_through(name, bad):
    ours, exact = Run(name, [[20]], torch.float32), Run(name, [[20]], torch.float32)
    for run in (ours, exact):
        run.flats[0].grad[3] = bad
    ours.update(Applier(ours.rule, ours.cuts))
    exact.update(by_loop(exact))
    finite = exact.flats[0].isfinite()
    assert torch.equal(ours.flats[0].isfinite(), finite)
    torch.testing.assert_close(ours.flats[0][finite], exact.flats[0][finite])


def test_bias_correction_keeps_its_digits():
    """1 - 0.999^t in float32 would have four of them."""
    run = Run("adamw", [[1]], torch.float32)
    run.group |= {"betas": (0.9, 0.99999), "weight_decay": 0.0}
    start, gradient = run.flats[0].clone(), run.flats[0].grad.clone()
    run.update(Applier(run.rule, run.cuts))
    expected = -0.1 * run.factors[0] * gradient.sign()
    torch.testing.assert_close(run.flats[0] - start, expected, rtol=1e-5, atol=1e-6)


def test_types_that_differ_within_a_group():
    flats = [torch.ones(5), torch.ones(5, dtype=torch.bfloat16), torch.ones(5, dtype=torch.float64)]
    for flat in flats:
        flat.grad = torch.full_like(flat, 0.5)
    cuts = {flat: cut_flat(5, [Segment(i, 0, 5, 0)], range(3), [False] * 3) for i, flat in enumerate(flats)}
    group = {"params": flats, "lr": 1.0, "weight_decay": 0.0, **KEYS["sgd without momentum"]}
    factor = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
    Applier(RULES["sgd"], cuts).apply([group], {flat: {} for flat in flats}, Rates(factor))
    assert [float(flat[0]) for flat in flats] == [0.5, 0.75, 0.875]


def test_memory_that_is_replaced_is_found():
    run = Run("sgd without momentum", [[20]], torch.float32)
    applier = Applier(run.rule, run.cuts)
    run.update(applier)
    (flat,) = run.flats
    flat.data = flat.detach().clone()
    before = flat.clone()
    run.update(applier)
    assert not torch.equal(flat, before)


@pytest.mark.parametrize("clip", [None, 0.25])
@pytest.mark.parametrize("name", ["lamb", "lars", "lars without momentum"])
def test_norms_of_trust_ratios(name, clip, monkeypatch):
    shapes = [(7, 9), (5,), (40, 1), (2, 2)]
    parameters = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    for parameter in parameters[:3]:
        parameter.grad = torch.randn_like(parameter)
    rule = RULES[name.split()[0]]
    placements = data_parallel([str(i) for i in range(4)], [p.shape for p in parameters], 1)
    groups = [{"lr": 0.1, "weight_decay": 0.1, **KEYS[name]}]
    state = {
        p: {key: torch.rand_like(p) for key in rule.buffers(groups[0])} | {"step": torch.tensor(3.0)}
        for p in parameters
    }

    def ratios():
        made = TrustRatios(
            rule, rule.trust, LenaConfig.from_keys({"base": name.split()[0]}), PlainLayout(parameters, 0, 1),
            placements, range(4), 4, [0] * 4, [True] * 4, None, torch.device("cpu"),
        )  # fmt: skip
        clipped = None if clip is None else torch.tensor(clip, dtype=torch.float64)
        return made.measure(clipped, torch.ones(4, dtype=torch.float64), groups, state)

    ours = ratios()
    monkeypatch.setattr("ds_lena.update.trust_ratio.runs_on", lambda device: False)
    torch.testing.assert_close(ours, ratios(), rtol=1e-6, atol=0)
    assert ours[1] == ours[3] == 1
    assert ours[0] != 1


def test_a_whole_training_is_that_of_the_loop(monkeypatch):
    def train(base):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3))
        optimizer = LENA(model.named_parameters(), lr=0.05, base=base, total_steps=8)
        for _ in range(4):
            for _ in range(2):
                model(torch.randn(5, 6)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()]

    for base in RULES:
        ours = train(base)
        with monkeypatch.context() as patch:
            for name in ("apply", "trust_ratio"):
                patch.setattr(f"ds_lena.update.{name}.runs_on", lambda device: False)
            loop = train(base)
        for one, other in zip(ours, loop, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


class Refusing:
    """Triton on a device that it does not know."""

    TYPES = dict.fromkeys(NARROW)

    def __getattr__(self, name):
        raise RuntimeError("no such device")


@pytest.fixture
def refusing(monkeypatch):
    monkeypatch.setattr(launch, "programs", lambda: Refusing())
    launch._tell.cache_clear()


def test_where_a_kernel_is_refused_the_loop_moves_and_says_so_once(refusing, caplog):
    ours, loop = Run("adamw", [[20, 3]], torch.float32), Run("adamw", [[20, 3]], torch.float32)
    applier = Applier(ours.rule, ours.cuts)
    with caplog.at_level(logging.WARNING, "ds_lena"):
        for _ in range(2):
            ours.update(applier)
            loop.update(by_loop(loop))
    assert torch.equal(ours.flats[0], loop.flats[0])
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no such device" in caplog.text


def test_a_refused_kernel_keeps_nothing_alive(refusing):
    run = Run("adamw", [[20]], torch.float32)
    run.update(Applier(run.rule, run.cuts))
    flat = weakref.ref(run.flats[0])
    del run
    gc.collect()
    assert flat() is None


@pytest.mark.parametrize("what", ["one of two moments in another type", "a count in another type"])
def test_a_state_that_a_kernel_would_misread_moves_by_the_loop(what):
    run = Run("adamw", [[20]], torch.float32)
    (flat,) = run.flats
    state = {"exp_avg": torch.zeros(20), "exp_avg_sq": torch.zeros(20), "step": torch.zeros(())}
    if what == "a count in another type":
        state["step"] = state["step"].double()
    else:
        state["exp_avg_sq"] = state["exp_avg_sq"].bfloat16()
    run.state[flat] = state
    row = [flat, flat.grad, *state.values()]
    launcher = Applier(run.rule, run.cuts)._launcher
    made = launcher.table("key", lambda: table.pieces_of(0, run.cuts[flat]), flat.device)
    before = flat.clone()
    assert launcher.launch(made, [row], run.group, torch.ones(1)) == [0]
    assert torch.equal(flat, before)


@pytest.mark.parametrize("base", ["adamw", "lamb"])
def test_tables_do_not_grow_with_the_sets_of_tensors_that_have_a_gradient(base):
    weights = [torch.nn.Parameter(torch.ones(3, 3)) for _ in range(4)]
    optimizer = LENA([(str(i), weight) for i, weight in enumerate(weights)], base=base, total_steps=100)
    for update in range(8):
        optimizer.zero_grad()
        sum(weight.square().sum() for i, weight in enumerate(weights) if (update >> i) % 2 == 0).backward()
        optimizer.step()
    controller = controller_of(optimizer)
    launchers = [controller._applier._launcher, *([controller._trust._launcher] if base == "lamb" else [])]
    assert [len(launcher._tables) for launcher in launchers] == [1] * len(launchers)


def test_the_memory_of_a_table_is_what_the_docs_say(monkeypatch):
    monkeypatch.setattr(table, "BLOCK", 1024)
    made = table.Table([(0, 0, 1_000_000, 0), (1, 0, 24_000, 2)], torch.device("cpu"))
    assert made.chunks.nbytes / 1_024_000 == pytest.approx(32 / 1024, rel=1e-2)
    assert made.rates.nbytes == made.chunks.nbytes / 4


def test_chunks_cover_each_element_once_and_far_ones_too():
    """Beyond 2^31 elements."""
    far = 1 << 33
    chunks = table.in_chunks([(0, 0, 40, 2), (1, far, far + 17, 5), (1, 7, 7, 3)])
    assert chunks.tolist() == [[0, 0, 16, 2], [0, 16, 32, 2], [0, 32, 40, 2], [1, far, far + 16, 5],
                               [1, far + 16, far + 17, 5]]  # fmt: skip
