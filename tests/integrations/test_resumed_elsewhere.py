"""HF Trainer and accelerate go on from a checkpoint with other ranks, ZeRO stage and accumulation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DeepSpeedPlugin, DummyOptim
from transformers import Trainer, TrainingArguments

import ds_lena
from tests.helpers.marks import rest
from tests.integrations._ranks import Ranks
from tests.integrations.scripts.hf_trainer import Tokens, config, model

PER_UPDATE, BATCH = 4, 2  # micro-batches of all ranks, samples
SAVED_AFTER, UPDATES = 3, 7  # 14 micro-batches an epoch: its last window is short
LR = 3e-3


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(tmp_path_factory.mktemp("one_rank"), world=1)
    yield started
    started.stop()


def by_trainer(folder: str, stage: int, resume: str | None = None, seed: int = 0) -> dict[str, Any]:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    ranks = torch.distributed.get_world_size()
    arguments = TrainingArguments(
        output_dir=folder,
        deepspeed=config(zero_optimization={"stage": stage}, gradient_clipping=1.0),
        max_steps=UPDATES,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=PER_UPDATE // ranks,
        learning_rate=LR,
        lr_scheduler_type="linear",
        save_steps=SAVED_AFTER,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
    )
    trainer = Trainer(model=model(seed), args=arguments, train_dataset=Tokens())
    trainer.train(resume_from_checkpoint=resume)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    result = {"loss": [entry["loss"] for entry in history], "report": ds_lena.report(trainer)}
    trainer.deepspeed.destroy()
    return result


def by_accelerate(folder: str, stage: int, resume: bool = False, seed: int = 0) -> dict[str, Any]:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    ranks = torch.distributed.get_world_size()
    keys = {"type": "LENA", "params": {"lr": LR, "weight_decay": 0.0, "total_steps": UPDATES, "smoothing": 0.5}}
    entries = config(
        zero_optimization={"stage": stage},
        train_micro_batch_size_per_gpu=BATCH,
        gradient_accumulation_steps=PER_UPDATE // ranks,
        optimizer=keys,
    )
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=entries))
    net = model(seed)
    net, optimizer = accelerator.prepare(net, DummyOptim(net.parameters(), lr=LR))
    data = [*torch.utils.data.DataLoader(Tokens(), batch_size=BATCH)] * 2  # without a GPU accelerate shares none out
    first = 0
    if resume:
        accelerator.load_state(folder)
        accelerator.step = 0  # it brings back the count of micro-batches, of which a window there had another number
        first = ds_lena.report(net)["update"]
    losses: list[float] = []
    passes = PER_UPDATE // ranks
    for update in range(first, SAVED_AFTER + 2):
        mine = data[update * PER_UPDATE : (update + 1) * PER_UPDATE][torch.distributed.get_rank() :: ranks]
        total = torch.zeros(())
        for batch in mine:
            with accelerator.accumulate(net):
                loss = net(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.detach() / passes
        torch.distributed.all_reduce(total)
        losses.append(float(total) / ranks)
        if update + 1 == SAVED_AFTER and not resume:
            accelerator.save_state(folder)
    result = {"loss": losses, "report": ds_lena.report(net)}
    net.destroy()
    return result


def compare(unbroken: dict[str, Any], resumed: dict[str, Any]) -> None:
    """Sums over ranks round otherwise."""
    assert resumed["loss"][-1] != resumed["loss"][-2], "it trains"
    assert resumed["loss"] == pytest.approx(unbroken["loss"][-len(resumed["loss"]) :], rel=2e-5)
    first, second = unbroken["report"], resumed["report"]
    for key in ("update", "n", "base", "skipped", "nonfinite"):
        assert first[key] == second[key]
    for name, layer in first["layers"].items():
        other = second["layers"][name]
        assert [other[key] for key in ("gain", "warmup", "state")] == pytest.approx(
            [layer[key] for key in ("gain", "warmup", "state")], rel=1e-3
        )


STAGES = [(2, 3), (3, 0), (0, 1), (1, 2), (3, 3)]


@pytest.mark.parametrize(("saved", "loaded"), rest(STAGES, [(2, 3), (0, 1)]))
def test_trainer_goes_on_with_other_ranks(
    ranks: Ranks, one_rank: Ranks, tmp_path: Path, saved: int, loaded: int
) -> None:
    checkpoint = f"checkpoint-{SAVED_AFTER}"
    both = ranks.run(by_trainer, str(tmp_path / "two"), saved)
    (alone,) = one_rank.run(
        by_trainer, str(tmp_path / "one"), loaded, resume=str(tmp_path / "two" / checkpoint), seed=1
    )
    compare(both[0], alone)
    assert len(alone["loss"]) == UPDATES  # the Trainer's log goes on from the checkpoint's
    back = ranks.run(by_trainer, str(tmp_path / "back"), saved, resume=str(tmp_path / "one" / "checkpoint-6"), seed=2)
    compare(both[0], back[0])


@pytest.mark.parametrize(("saved", "loaded"), rest(STAGES, [(3, 2)]))
def test_accelerate_goes_on_with_other_ranks(
    ranks: Ranks, one_rank: Ranks, tmp_path: Path, saved: int, loaded: int
) -> None:
    both = ranks.run(by_accelerate, str(tmp_path), saved)
    (alone,) = one_rank.run(by_accelerate, str(tmp_path), loaded, resume=True, seed=1)
    assert len(alone["loss"]) == 2
    compare(both[0], alone)
