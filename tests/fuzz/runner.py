"""One draw as one rank sees it. Every rank calls `run` with the same draw."""

from __future__ import annotations

import gc
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import ds_lena
from tests.fuzz.draws import BAD, Draw
from tests.fuzz.model import Experts, Model, initial_weights
from tests.helpers.case import SCHEDULES
from tests.helpers.grids import one_autocast

LINEAR = torch.nn.functional.linear


def run(draw: Draw, folder: str) -> dict[str, Any]:
    """The reports after every update and the weights at the end, or the refusal. `folder`: for checkpoints."""
    loop = PlainLoop(draw, folder) if draw.stage is None else EngineLoop(draw, folder)
    try:
        with one_autocast():
            return loop.train()
    except ds_lena.LenaError as error:
        return {"refused": type(error).__name__, "text": str(error)}
    finally:
        loop.close()


class Loop:
    """What the loops of plain PyTorch and of an engine share."""

    def __init__(self, draw: Draw, folder: str) -> None:
        self.draw, self.folder = draw, folder
        self.rank = dist.get_rank()

    def train(self) -> dict[str, Any]:
        self.make()
        reports = []
        for update, event in enumerate(self.draw.events):
            if event == "saved":
                self.save_and_load()
            self.update(update)
            reports.append(None if self.draw.optimizer == "stock" else self.report())
        return {"reports": reports, "params": self.weights()}

    def update(self, update: int) -> None:
        event = self.draw.events[update]
        if event == "broken":
            self.broken_pass(update)
        if event == "loaded":
            self.load_in_mid_window(update)
        if event == "looked at":
            first, _ = self.losses(self.model, update, BAD)
            torch.autograd.grad(first, self.bare.out.weight)
        if event == "thrown away":
            self.micro_batch(update, BAD, last=False)
            self.zero_grad()
        self.accumulate_and_step(update)

    def accumulate_and_step(self, update: int) -> None:
        self.accumulate(update)
        self.step()

    def accumulate(self, update: int) -> None:
        event, window = self.draw.events[update], self.draw.plan[update]
        for micro in range(window.micros):
            if event.startswith("evaluated"):
                self.evaluate(update, with_gradients=event != "evaluated")
            if event == "thrown away later" and micro == 1:
                self.zero_grad()
            self.micro_batch(update, micro, last=micro == window.micros - 1)

    def broken_pass(self, update: int) -> None:
        """A backward pass that ends in the middle, as when memory runs out."""

        def fail(gradient: Tensor) -> None:
            raise MemoryError

        handle = self.bare.embed.weight.register_hook(fail)
        with suppress(MemoryError):
            self.micro_batch(update, BAD, last=False)
        handle.remove()
        self.zero_grad()

    def losses(self, model: Any, update: int, micro: int) -> tuple[Tensor, Tensor]:
        first, second = model(*self.draw.batch(update, self.rank, micro))
        factor = float("inf") if self.draw.plan[update].poisoned else 1.0
        return first * factor, second

    def evaluate(self, update: int, with_gradients: bool) -> None:
        self.model.eval()
        with nullcontext() if with_gradients else torch.no_grad():
            self.model(*self.draw.batch(update, self.rank, BAD))
        self.model.train()

    def prepare(self, model: Model) -> Model:
        model.has_one_loss = False
        if "hook" in self.draw.features:
            model.place_hook()
        return model


class PlainLoop(Loop):
    """One process, or DistributedDataParallel."""

    def make(self) -> None:
        draw = self.draw
        self.model: Any = self.prepare(draw.make_model())
        self.bare = self.model
        if draw.compiled == "model":
            self.model = torch.compile(self.model, backend="aot_eager")
        if draw.world > 1:
            self.model = DistributedDataParallel(self.model, **draw.config)
        groups = draw.param_groups(self.bare)
        if draw.optimizer == "stock":
            self.optimizer: Any = _stock(draw, _without_names(groups))
        else:
            self.optimizer = ds_lena.LENA(_without_names(groups) if draw.unnamed else groups, **draw.keys)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, SCHEDULES[draw.schedule])
        if "late hook" in draw.features:
            self.bare.place_hook()
        self.model.train(not draw.eval_mode)

    def micro_batch(self, update: int, micro: int, last: bool) -> None:
        window = self.draw.plan[update]
        waits = self.draw.loop == "no_sync" and not last
        with self.model.no_sync() if waits else nullcontext():
            first, second = self.losses(self.model, update, micro)
            if micro not in window.idle:
                ((first + second) / window.micros).backward()

    def accumulate_and_step(self, update: int) -> None:
        def closure() -> None:
            self.accumulate(update)
            if self.draw.clipping:
                nn.utils.clip_grad_norm_(self.bare.parameters(), self.draw.clipping)

        if self.draw.has_closure:
            self.optimizer.step(closure)
        else:
            closure()
            self.optimizer.step()
        self.scheduler.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        (self.model if self.draw.zeroed_by == "module" else self.optimizer).zero_grad()

    def save_and_load(self) -> None:
        saved = [part.state_dict() for part in (self.bare, self.optimizer, self.scheduler)]
        self.make()
        for part, state in zip((self.bare, self.optimizer, self.scheduler), saved, strict=True):
            part.load_state_dict(state)

    def report(self) -> dict[str, Any]:
        report = ds_lena.report(self.optimizer)
        if self.draw.unnamed:  # `param_0` is the first parameter that it was given
            names = [name for group in self.draw.param_groups(self.bare) for name, _ in group["params"]]
            layers = report["layers"]
            report["layers"] = {name: layers[f"param_{i}"] for i, name in enumerate(names) if f"param_{i}" in layers}
        return report

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.bare.named_parameters() if p.requires_grad}

    def close(self) -> None:
        gc.collect()


class EngineLoop(Loop):
    """A DeepSpeed engine."""

    model: Any = None

    def make(self) -> None:
        import deepspeed

        draw = self.draw
        model = self.prepare(self._new_model())
        self.bare = model
        groups = _without_names(draw.param_groups(model))
        optimizer: Any = None
        if draw.optimizer == "stock":
            optimizer = _stock(draw, groups)
        elif draw.optimizer == "client":
            optimizer = ds_lena.LENA(groups, **draw.keys)
        scheduler = None
        if draw.schedule != "constant":
            scheduler = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=SCHEDULES[draw.schedule])
        if draw.has_leaf_experts:
            deepspeed.utils.set_z3_leaf_modules(model, [Experts])
        flat = groups[0]["params"] if draw.groups == "flat" else groups
        self.model, *_ = deepspeed.initialize(
            model=torch.compile(model, backend="aot_eager") if draw.compiled == "model" else model,
            model_parameters=flat if optimizer is None else None,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            config=draw.deepspeed_config(),
        )
        if draw.compiled == "engine":
            self.model.compile(backend="aot_eager")
        if "late hook" in draw.features:
            model.place_hook()
        self.model.train(not draw.eval_mode)

    def _new_model(self) -> Model:
        import deepspeed

        draw = self.draw
        if not draw.zero_init:
            return draw.make_model()
        with deepspeed.zero.Init(config_dict_or_path=draw.deepspeed_config()):
            model = Model(draw.features, draw.checkpointing)
        for name, weight in initial_weights(draw.features).items():
            p = model.get_parameter(name)
            with deepspeed.zero.GatheredParameters(p, modifier_rank=0):
                if self.rank == 0:
                    p.data.copy_(weight)
        return model

    def update(self, update: int) -> None:
        now, before = self.draw.plan[update], self.draw.plan[max(update - 1, 0)]
        if now.size != before.size:
            self.model.set_train_micro_batch_size(now.size)
        if now.micros != before.micros and self.draw.loop == "engine":
            self.model.set_train_batch_size(now.size * now.micros * self.draw.world)
        with self.model.coalesce_grad_reduction() if self.draw.loop == "coalesce" else nullcontext():
            super().update(update)
        if self.draw.loop == "coalesce":
            self.model.step()

    def micro_batch(self, update: int, micro: int, last: bool) -> None:
        draw, engine, window = self.draw, self.model, self.draw.plan[update]
        if draw.loop == "boundary":
            engine.set_gradient_accumulation_boundary(last)
        with engine.no_sync() if draw.loop == "no_sync" and not last else nullcontext():
            first, second = self.losses(engine, update, micro)
            if micro not in window.idle:
                self._backward(first, second, update)
        if draw.loop in ("engine", "torch backward") and micro != BAD:
            engine.step()

    def _backward(self, first: Tensor, second: Tensor, update: int) -> None:
        micros, engine = self.draw.plan[update].micros, self.model
        if self.draw.events[update] == "second backward":
            engine.backward(first, retain_graph=True)
            engine.backward(second)
        elif self.draw.loop == "torch backward":
            (first + second).backward()
        elif self.draw.loop == "engine":
            engine.backward(first + second)
        else:
            engine.backward((first + second) / micros, scale_wrt_gas=False)

    def step(self) -> None:
        if self.draw.loop not in ("engine", "torch backward", "coalesce"):
            self.model.step()

    def zero_grad(self) -> None:
        engine = self.model
        {"engine": engine, "module": engine.module, "wrapper": engine.optimizer}[self.draw.zeroed_by].zero_grad()

    def save_and_load(self) -> None:
        folder = Path(self.folder) / "checkpoint"
        self.model.save_checkpoint(str(folder))
        self.close()
        self.make()
        self.model.load_checkpoint(str(folder))

    def load_in_mid_window(self, update: int) -> None:
        folder = str(Path(self.folder) / "checkpoint")
        self.model.save_checkpoint(folder)
        self.micro_batch(update, BAD, last=False)
        self.model.load_checkpoint(folder)

    def report(self) -> dict[str, Any]:
        return ds_lena.report(self.model)

    def weights(self) -> dict[str, Tensor]:
        """The master of every trained parameter, as a copy in float32."""
        trained = {name: p for name, p in self.bare.named_parameters() if p.requires_grad}
        empty = {name: torch.zeros(0, 5) for name in trained if name == "empty"}  # DeepSpeed leaves it out
        masters = self._masters({name: p for name, p in trained.items() if name not in empty}) | empty
        return {name: weight.detach().float().clone() for name, weight in masters.items()}

    def _masters(self, trained: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """Read where the layout keeps them."""
        from deepspeed.utils import safe_get_full_fp32_param

        wrapper, masters = self.model.optimizer, {}
        if self.draw.stage == 0 and self.draw.precision != "bf16":
            return dict(trained)
        if self.draw.stage == 0:
            for low, high in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
                masters |= {id(p): master for p, master in zip(low, high, strict=True)}
        elif self.draw.zero.get("round_robin_gradients") and hasattr(wrapper, "round_robin_bit16_groups"):
            # DeepSpeed's map of fragments is wrong there.
            flats = wrapper.single_partition_of_fp32_groups
            groups = zip(flats, wrapper.round_robin_bit16_groups, wrapper.round_robin_bit16_offsets, strict=True)
            for mine, parameters, starts in groups:
                parts = [torch.empty_like(mine) for _ in range(self.draw.world)]
                dist.all_gather(parts, mine.detach())
                whole = torch.cat(parts)
                for p, start in zip(parameters, starts, strict=True):
                    masters[id(p)] = whole[start : start + p.numel()].view(p.shape)
        else:
            masters = {id(p): safe_get_full_fp32_param(p) for p in trained.values()}
        return {name: masters[id(p)] for name, p in trained.items()}

    def close(self) -> None:
        engine, self.model = self.model, None
        if engine is not None:
            engine.destroy()
        torch.nn.functional.linear = LINEAR  # ZeRO-3 leaves its own behind, which rounds differently in bf16
        del engine
        gc.collect()


def _without_names(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [group | {"params": [p for _, p in group["params"]]} for group in groups]


def _stock(draw: Draw, groups: list[Any]) -> torch.optim.Optimizer:
    """torch's AdamW in LENA's place: does DeepSpeed run this draw at all?"""
    return torch.optim.AdamW(groups, lr=draw.keys["lr"])
