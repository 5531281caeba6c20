"""What ranks that share a micro-batch need is there, or refused, with one message on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ds_lena
from benchmarks.footprint import Collectives
from ds_lena.integrations.deepspeed.axes import sequence
from tests.helpers.grids import one_grid
from tests.integrations._engines import Net, config, engine, moved, refusal, train, without_optimizer
from tests.integrations._ranks import WORLD, Ranks

MESH = {"sequence_parallel_size": WORLD, "data_parallel_size": 1}
FLAT = {"sequence_parallel_size": 1, "data_parallel_size": WORLD}


def ulysses() -> Any:
    from deepspeed.runtime.sequence_parallel import parallel_state_sp

    parallel_state_sp.initialize_sequence_parallel(WORLD)
    return parallel_state_sp


class TensorParts:
    """An mpu by which both ranks share micro-batches and hold parts of tensors."""

    def __getattr__(self, name: str) -> Any:
        if name == "initialize_sequence_parallel" or "pipe" in name:
            raise AttributeError(name)
        is_alone = "pipe" in name or ("data" in name and "sequence" not in name)
        alone = self.alone if is_alone else dist.group.WORLD
        given = {"group": alone, "size": dist.get_world_size(alone), "rank": dist.get_rank(alone)}
        return lambda: given[name.rpartition("_")[2]]

    def __init__(self) -> None:
        self.alone = [dist.new_group([rank]) for rank in range(WORLD)][dist.get_rank()]


def experts() -> nn.Module:
    from deepspeed.moe.layer import MoE

    return nn.Sequential(nn.Linear(4, 4), MoE(hidden_size=4, expert=nn.Linear(4, 4), num_experts=2))


@contextmanager
def stock(entries: dict[str, Any], **initialize: Any) -> Iterator[Any]:
    """An engine with torch's AdamW."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    with engine(without_optimizer(entries), model, optimizer=optimizer, **initialize) as made:
        yield made


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=32, num_key_value_heads=2, attn_implementation="sdpa", **sizes)
    return LlamaForCausalLM(config)


def refused(stage: int, model: Any = Net, mpu: Any = ulysses, mesh: Any = None, **entries: Any) -> str:
    with one_grid():
        given = {} if mpu is None else {"mpu": mpu()}
        return refusal(config(stage, **entries), model(), mesh_param=mesh, **given)


def test_it_is_welcome(ranks: Ranks) -> None:
    assert ranks.run(refused, 2) == ["", ""]
    assert ranks.run(refused, 2, mpu=None, **FLAT) == ["", ""], "a mesh that shares no micro-batch"


def test_a_mesh_is_refused(ranks: Ranks) -> None:
    for given in (MESH, {"mesh": (1, WORLD)}):
        for message in ranks.run(refused, 1, mpu=None, **given):
            assert "LENA does not support sequence parallelism by mesh_param" in message
            assert "mpu=parallel_state_sp" in message


def test_a_size_alone_is_refused(ranks: Ranks) -> None:
    for message in ranks.run(refused, 1, mpu=None, sequence_parallel_size=WORLD):
        assert 'LENA does not support "sequence_parallel_size" without "data_parallel_size"' in message


def drift_of_stock(mesh: bool) -> float:
    """How far apart the ranks' weights are after three updates, in which they have seen different data."""
    with one_grid(), stock(config(1, **(MESH if mesh else FLAT))) as made:
        train(made, range(3))
        weight = made.module.left[0].weight.detach()
        others = [torch.empty_like(weight) for _ in range(WORLD)]
        dist.all_gather(others, weight)
        return float((others[0] - others[1]).abs().max())


def test_by_a_mesh_deepspeed_still_lets_the_ranks_drift_apart(ranks: Ranks) -> None:
    """If this fails, this DeepSpeed averages over the ranks of the sequence, and LENA may support it."""
    assert all(drift > 1e-3 for drift in ranks.run(drift_of_stock, True))
    assert ranks.run(drift_of_stock, False) == [0.0, 0.0]


def refused_without_mpu(**entries: Any) -> str:
    with one_grid():
        ulysses()
        return refusal(config(1, **entries), Net())


def test_groups_that_the_engine_does_not_know_are_refused(ranks: Ranks) -> None:
    for message in ranks.run(refused_without_mpu):
        assert "sequence-parallel ranks of which the engine does not know" in message
    for message in ranks.run(refused, 1, model=llama, tensor_parallel={"autotp_size": WORLD}):
        assert "sequence-parallel ranks of which the engine does not know" in message


def test_tensor_parallelism_beside_it_is_refused(ranks: Ranks) -> None:
    for message in ranks.run(refused, 1, mpu=TensorParts):
        assert "sequence parallelism together with tensor or pipeline parallelism" in message


def test_experts_beside_it_are_refused(ranks: Ranks) -> None:
    for message in ranks.run(refused, 1, model=experts):
        assert "layers of deepspeed.moe with tensor, pipeline or sequence parallelism" in message


def test_wrong_scales_are_refused(ranks: Ranks) -> None:
    for message in ranks.run(refused, 3, zero={"reduce_scatter": False}):
        assert 'sequence parallelism with "reduce_scatter": false at ZeRO-3' in message
    for message in ranks.run(refused, 1, prescale_gradients=False, gradient_predivide_factor=float(WORLD)):
        assert "or with sequence parallelism (DeepSpeed scales wrongly there)" in message


def gradients_in_the_norm() -> int:
    """How many DeepSpeed has. Its step, which fails without one, would leave the other rank behind."""
    with one_grid(), stock(config(1, "bf16-fp32", gradient_accumulation_steps=1), mpu=ulysses()) as made:
        made.backward(made(torch.ones(2, 4), torch.ones(2, 4)))
        return len(made.optimizer.get_grads_for_norm()[0])


def test_where_deepspeed_still_fails_it_is_refused(ranks: Ranks) -> None:
    for message in ranks.run(refused, 1, precision="bf16-fp32"):
        assert "sequence parallelism at ZeRO 1 in bf16 with fp32 accumulation" in message
    first, second = ranks.run(gradients_in_the_norm)
    assert first > 0 and second == 0


def other_group_options() -> str:
    """Rank 1 leaves out what rank 0 trains with LENA."""
    with one_grid():
        mpu, model = ulysses(), Net()
        group = {"params": list(model.parameters()), "lena": dist.get_rank() == 0}
        return refusal(config(1), model, model_parameters=[group], mpu=mpu)


def test_ranks_that_disagree_are_told_so(ranks: Ranks) -> None:
    first, second = ranks.run(other_group_options)
    assert first == second and "the ranks of one model disagree on" in first


def divisor_of(stage: int) -> float:
    """By what DeepSpeed divides the sum of both ranks' gradients."""
    with one_grid(), stock(config(stage, gradient_accumulation_steps=1), mpu=ulysses()) as made:
        from deepspeed.utils import safe_get_full_grad

        parameter, seen = made.module.left[0].bias, []
        parameter.register_hook(lambda gradient: seen.append(gradient.clone()))
        made.set_gradient_accumulation_boundary(True)
        made.backward(made(torch.ones(2, 4)))
        averaged = parameter.grad if stage == 0 else safe_get_full_grad(parameter)
        total = seen[0].clone()
        dist.all_reduce(total)
        divisor = float(total.norm() / averaged.norm())
        made.step()
        return round(divisor, 4)


def test_deepspeed_still_divides_by_more_at_zero_3(ranks: Ranks) -> None:
    """If this fails, correct `Zero3Layout.divisor` and the page in docs/layouts.md."""
    assert [ranks.run(divisor_of, stage)[0] for stage in range(4)] == [1.0, 1.0, 1.0, 2.0]


def collectives(stage: int, mine: bool) -> dict[str, tuple[int, int]]:
    with one_grid(), (engine if mine else stock)(config(stage), mpu=ulysses()) as here:
        train(here, range(2))
        with Collectives() as seen:
            train(here, range(2, 3))
        return seen.by_name


@pytest.mark.parametrize("stage", [0, 1])
def test_it_adds_one_collective_for_each_bucket_and_micro_batch_and_one_for_each_update(
    ranks: Ranks, stage: int
) -> None:
    for own, stock in zip(ranks.run(collectives, stage, True), ranks.run(collectives, stage, False), strict=True):
        elements = sum(parameter.numel() for parameter in Net().parameters())
        joined = own.get("reduce", (0, 0))[0] - stock.get("reduce", (0, 0))[0]
        sent = own.get("reduce", (0, 0))[1] - stock.get("reduce", (0, 0))[1]
        assert (joined, sent) == (2, 2 * 4 * elements), "two micro-batches"
        assert own["allreduce"][0] == stock["allreduce"][0] + 1


class Breaking(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError("broken off")


def after_a_broken_pass(stage: int, breaks: bool) -> Any:
    """The report of a run that starts with a pass that an exception ends, and that is thrown away; or without it."""
    with one_grid(), engine(config(stage), Net(), mpu=ulysses()) as made, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequence, "ELEMENTS", 40)
        if breaks:
            handle = made.module.left[0].register_forward_hook(lambda module, given, x: Breaking.apply(x))
            with pytest.raises(RuntimeError, match="broken off"):
                made.backward(made(torch.ones(2, 4), torch.ones(2, 4)))
            handle.remove()
            made.zero_grad()
        train(made, range(2))
        return ds_lena.report(made)


@pytest.mark.parametrize("stage", [0, 1])
def test_a_broken_pass_leaves_no_trace(ranks: Ranks, stage: int) -> None:
    assert ranks.run(after_a_broken_pass, stage, True) == ranks.run(after_a_broken_pass, stage, False)


def resumed(folder: str, stage: int) -> tuple[bool, bool]:
    """Whether a run that goes on from its checkpoint ends with the same report, and the same weights."""
    with one_grid():
        mpu = ulysses()
        with engine(config(stage), Net(), mpu=mpu) as made:
            train(made, range(2))
            made.save_checkpoint(folder)
            train(made, range(2, 4))
            report, weights = ds_lena.report(made), moved(made)
        with engine(config(stage), Net(seed=1), mpu=mpu) as made:
            made.load_checkpoint(folder)
            train(made, range(2, 4))
            same = all(torch.equal(a, b) for a, b in zip(weights, moved(made), strict=True))
            return ds_lena.report(made) == report, same


@pytest.mark.parametrize("stage", [1, 3])
def test_a_resumed_run_is_the_unbroken_run(ranks: Ranks, tmp_path: Path, stage: int) -> None:
    assert ranks.run(resumed, str(tmp_path), stage) == [(True, True)] * 2


class Tokens(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 12

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        tokens = torch.randint(32, (8,), generator=torch.Generator().manual_seed(number))
        return {"input_ids": tokens, "labels": tokens, "position_ids": torch.arange(8)}


def trained_by_hf(folder: str) -> tuple[int, Any]:
    """The updates of an HF Trainer that shares each micro-batch, and LENA's report."""
    from accelerate import ParallelismConfig
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DeepSpeedSequenceParallelConfig
    from transformers import Trainer, TrainingArguments
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    entries = config(3, lena={"total_steps": None, "lr": "auto"}, train_micro_batch_size_per_gpu="auto")
    arguments = TrainingArguments(
        output_dir=folder,
        deepspeed=entries | {"gradient_accumulation_steps": "auto", "gradient_clipping": "auto"},
        parallelism_config=ParallelismConfig(
            sp_size=WORLD,
            sp_backend="deepspeed",
            sp_handler=DeepSpeedSequenceParallelConfig(sp_attn_implementation="sdpa"),
        ),
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    try:
        with one_grid():
            trainer = Trainer(model=llama(), args=arguments, train_dataset=Tokens())
            trainer.train()
            report = ds_lena.report(trainer)
            trainer.deepspeed.destroy()
            return trainer.state.global_step, report
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = before
        AcceleratorState._reset_state(True)
        GradientState._reset_state()


def test_hf_trainer_shares_micro_batches(ranks: Ranks, tmp_path: Path) -> None:
    first, second = ranks.run(trained_by_hf, str(tmp_path))
    assert first == second
    updates, report = first
    assert (updates, report["update"], report["n"], report["skipped"], report["nonfinite"]) == (3, 3, 2, 0, 0)
    assert all(layer["noise"] > 0 for layer in report["layers"].values())
