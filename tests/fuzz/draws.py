"""What the fuzz draws: a configuration, a model and a loop, decided by a seed alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from tests.fuzz.model import FEATURES, HOOKS, MEMORY, Batch, Model, build, make_tokens
from tests.helpers.case import LR, USAGE, Case, Window
from tests.helpers.reference import Window as ReferenceWindow

BAD = 90
"""The number of a micro-batch that is thrown away."""

NO_LENA = ("odd", "single", "h.1.norm.weight")
IN_PARTS = "came in several parts within one backward pass"
IN_FORWARD = "a loss has called backward in its own forward"
BROKEN = "an exception has ended an earlier backward pass"
SECOND = "a second backward pass for one micro-batch"
ALL_BF16 = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
AUTOCAST = {"enabled": True, "dtype": "bfloat16"}
SMALL_BUCKETS = {"reduce_bucket_size": 300, "allgather_bucket_size": 300}

# Refused when the engine is made: what the error says, DeepSpeed's entries, those of ZeRO, the ZeRO stages.
Entries = dict[str, Any]
REFUSED: tuple[tuple[str, Entries, Entries, tuple[int, ...]], ...] = (
    ('"torch_autocast" with fp16', {"torch_autocast": AUTOCAST | {"dtype": "float16"}}, {}, (1, 2, 3)),
    ('"super_offload"', {}, {"offload_optimizer": {"device": "cpu", "super_offload": True}}, (1, 2, 3)),
    ('"zero_quantized_gradients"', {}, {"zero_quantized_gradients": True}, (3,)),
    ('"gradient_allreduce_op": "sum"', {"gradient_allreduce_op": "sum"}, {}, (0, 1, 2)),
    ('"elastic_checkpoint"', {}, {"elastic_checkpoint": True}, (1, 2)),
)


@dataclass(frozen=True, repr=False)
class Draw(Case):
    """A case with a model of its own; it prints itself as the call that makes it. Fields not named here are `Case`'s.

    `features`, `checkpointing`: of the model. `events`: what happens in each update, or before it. `unnamed`: LENA gets
    no names. `has_closure`: step() gets one. `tensor_lr`: of the groups. `zeroed_by`: the owner of the zero_grad() that
    is called, "engine", "module" or "wrapper"; in plain PyTorch "engine" is the optimizer. `refused`: what LENA's error
    must say, if it has to refuse.
    """

    name: str = ""
    features: tuple[str, ...] = ()
    checkpointing: str = "none"
    events: tuple[str, ...] = ()
    eval_mode: bool = False
    empty_group: bool = False
    unnamed: bool = False
    zeroed_by: str = "engine"
    has_closure: bool = False
    tensor_lr: bool = False
    refused: str = ""

    def __repr__(self) -> str:
        shown = []
        for field in fields(self):
            default = field.default if field.default_factory is MISSING else field.default_factory()
            if getattr(self, field.name) != default:
                shown.append(f"{field.name}={getattr(self, field.name)!r}")
        return f"Draw({', '.join(shown)})"

    def make_model(self, is_reference: bool = False) -> Model:
        model = build(self.features, "none" if is_reference else self.checkpointing, is_reference)
        if not is_reference and self.stage is None:
            model.to({"fp64": torch.float64, "all bf16": torch.bfloat16}.get(self.precision, torch.float32))
        model.autocast = self.precision == "autocast" and (is_reference or self.stage is None)  # else the engine does
        return model

    def param_groups(self, model: nn.Module, is_reference: bool = False) -> list[dict[str, Any]]:
        """Param groups of (name, parameter) pairs."""
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if self.groups != "named":
            return [{"params": trained}]
        lr: Any = torch.tensor(LR[self.base]) if self.tensor_lr and not is_reference else LR[self.base]
        kinds: dict[str, list[Any]] = {"matrices": [], "vectors": [], "left out": []}
        for name, p in trained:
            dims = len(getattr(p, "ds_shape", p.shape))  # zero.Init leaves p itself empty
            kinds["left out" if name in NO_LENA else "matrices" if dims > 1 else "vectors"].append((name, p))
        return [
            {"params": kinds["matrices"], "lr": lr, "weight_decay": 0.1},
            *([{"params": [], "lr": lr}] if self.empty_group else []),
            {"params": kinds["vectors"], "lr": lr / 2, "weight_decay": 0.0},
            {"params": kinds["left out"], "lr": lr, "weight_decay": 0.05, "lena": False},
        ]

    @property
    def has_leaf_experts(self) -> bool:
        return self.stage == 3 and "experts" in self.features and "leaf" in self.features

    @property
    def keeps_what_is_thrown_away(self) -> bool:
        """DeepSpeed has reduced it already, see docs/support.md. ZeRO 2 is not drawn with "wrapper"."""
        has_own = self.stage == 3 or (self.stage == 1 and self.precision == "bf16-fp32")
        return self.stage == 2 or (has_own and self.zeroed_by != "wrapper")

    def batch(self, update: int, rank: int, micro: int) -> Batch:
        used = USAGE[self.usage](update, rank, micro)
        which = (update + micro + rank * self.has_leaf_experts) % 3
        window = self.plan[update]
        return make_tokens(update, rank, micro, window.size), used, which, window.micros

    def reference_windows(self) -> list[ReferenceWindow]:
        return [
            ReferenceWindow(
                [[self.batch(update, rank, micro) for micro in self._counted(update)] for rank in range(self.world)],
                divisor=window.micros,
                batch_size=window.size,
                applied=not window.poisoned,
            )
            for update, window in enumerate(self.plan)
        ]

    def _counted(self, update: int) -> list[int]:
        """The micro-batches whose gradients move the weights."""
        event, window = self.events[update], self.plan[update]
        micros = [micro for micro in range(window.micros) if micro not in window.idle]
        if event == "thrown away" and self.keeps_what_is_thrown_away:
            return [BAD, *micros]
        if event == "thrown away later" and not self.keeps_what_is_thrown_away:
            return micros[1:]
        return micros

    @property
    def narrow(self) -> torch.dtype | None:
        return {"fp32": None, "fp64": None, "autocast": torch.float32}.get(self.precision, torch.bfloat16)

    def deepspeed_config(self) -> dict[str, Any]:
        config = super().deepspeed_config()
        if self.precision == "all bf16":
            config["bf16"], config["data_types"] = ALL_BF16, {"grad_accum_dtype": "bf16"}
        return config | dict(self.config)


def draw(seed: int, worlds: Sequence[int] = (1, 2)) -> Draw:
    """The draw of a seed; `worlds`: the numbers of ranks to choose from."""
    rng = random.Random(seed)
    stage = rng.choice((None, 0, 1, 2, 3))
    base = rng.choice(("adamw", "adamw", "sgd", "lamb", "lars"))
    found: dict[str, Any] = {
        "world": rng.choice(worlds),
        "stage": stage,
        "base": base,
        "layer": rng.choice(("tensor", "tensor", "module", "block", "model")),
        "accumulation": rng.choice((1, 2, 2, 3)),
        "clipping": rng.choice((0.0, 0.5)),
        "schedule": rng.choice(("constant", "decaying")),
        "groups": rng.choice(("named", "flat")),
        "empty_group": rng.random() < 0.1,
        "eval_mode": rng.random() < 0.05,
        "checkpointing": rng.choice(("none", "none", "none", "non-reentrant", "reentrant", "deepspeed")),
        "lena": _keys(rng, base),
        "features": tuple(name for name in FEATURES if rng.random() < (0.1 if name in (*MEMORY, *HOOKS) else 0.25)),
    }
    if rng.random() < 0.97:
        found["features"] = _without(found["features"], "expanded")
    if rng.random() < 0.1:
        found["layer"], found["lena"] = "tensor", found["lena"] | {"exclude": [rng.choice(("*.bias", "h.0.*", "*"))]}
    if stage is None:
        _plain(rng, found)
    else:
        _engine(rng, found)
    _events(rng, found)
    if found["precision"] != "fp32" and base in ("adamw", "lamb"):
        # With a small eps Adam's first steps are the signs of gradients, and rounding decides those near 0.
        found["lena"] = found["lena"] | {"eps": 0.1}
    return _expect(found)


def _without(features: Sequence[str], *names: str) -> tuple[str, ...]:
    return tuple(name for name in features if name not in names)


def _keys(rng: random.Random, base: str) -> dict[str, Any]:
    """LENA's keys beside those that every case has."""
    choices: dict[str, Sequence[Any]] = {
        "scaling": ("gain", "gain", "gain", "linear", "sqrt", "none"),
        "warmup": ("layer", "layer", "fixed", "none"),
        "total_steps": (1, 4, 10, 40),
        "gain_power": (None, 0.5, 1.0),
        "smoothing": (None, 0.0, 0.5),
        "max_factor": (None, 1.5),
        "max_relative_gain": (4.0, 1.1, None),
        "base_batch_size": (None, 1, 4, 100),
        "no_decay": ([], ["*norm*"]),
        **({"trust_clip": (None, [0.01, 0.2])} if base in ("lamb", "lars") else {}),
        **({"nesterov": (False, True)} if base == "sgd" else {}),
    }
    return {key: rng.choice(values) for key, values in choices.items() if rng.random() < 0.5}


def _plain(rng: random.Random, found: dict[str, Any]) -> None:
    found["precision"] = rng.choice(("fp32", "fp32", "fp32", "fp64", "all bf16", "autocast"))
    found["has_closure"] = rng.random() < 0.2
    found["zeroed_by"] = rng.choice(("engine", "module"))
    found["tensor_lr"] = rng.random() < 0.1
    if found["checkpointing"] == "deepspeed":
        found["checkpointing"] = "none"
    if found["empty_group"] or rng.random() < 0.3:  # torch refuses an empty group beside groups with names
        found |= {"unnamed": True, "layer": "tensor"}
        found["lena"] = {key: value for key, value in found["lena"].items() if key not in ("no_decay", "exclude")}
    if "base_batch_size" in found["lena"]:
        found["lena"] = found["lena"] | {"micro_batch_size": 2}
    found["usage"] = rng.choice(list(USAGE)) if "sometimes" in found["features"] else "always"
    if rng.random() < 0.03:
        _compile(found)
    if found["world"] == 1:
        return
    # DDP itself refuses the first two, and the others' backward passes within a pass.
    found["features"] = _without(found["features"], "expanded", "strided", "tiled", "fused loss")
    if found["checkpointing"] == "reentrant":
        found["checkpointing"] = "none"
    if found["accumulation"] > 1 and rng.random() < 0.4:
        # A gradient of the first micro-batch alone is never averaged there, whatever the optimizer.
        found |= {"loop": "no_sync", "usage": "always", "features": _without(found["features"], "experts")}
    unused = found["usage"] != "always" or bool({"spare", "experts"} & set(found["features"]))
    found["config"] = {"find_unused_parameters": unused or rng.random() < 0.2}
    if not found["config"]["find_unused_parameters"]:
        found["config"]["gradient_as_bucket_view"] = rng.random() < 0.3
        if found["accumulation"] == 1:
            found["config"]["static_graph"] = rng.random() < 0.3


def _engine(rng: random.Random, found: dict[str, Any]) -> None:
    stage, world = found["stage"], found["world"]
    precisions = ["fp32", "fp32", "bf16", *(("bf16-fp32", "all bf16") if stage else ()), "autocast"]
    precision = found["precision"] = rng.choice(precisions)
    loops = ["engine", "engine", "boundary", "unmanaged", *(("coalesce",) if stage > 1 else ("no_sync",))]
    loops += ["torch backward"] if stage else []
    loop = found["loop"] = rng.choice(loops)
    found["optimizer"] = rng.choice(("json", "json", "client"))
    found["usage"] = rng.choice([*list(USAGE)[:4], *list(USAGE)[4 if stage == 0 else 5 :]])
    config: dict[str, Any] = {"managed_gradient_accumulation": False} if loop == "unmanaged" else {}
    zero: dict[str, Any] = {}
    on = [rng.random() < 0.2 for _ in range(12)]
    if stage:
        zero |= {"overlap_comm": True} if on[0] else {}
        zero |= {"contiguous_gradients": False} if on[1] else {}
        zero |= {"reduce_scatter": False} if on[2] or on[3] or on[4] else {}
        zero |= SMALL_BUCKETS if on[5] else {}
    if stage in (1, 2):
        zero |= {"round_robin_gradients": True} if on[6] else {}
        zero |= {"use_multi_rank_bucket_allreduce": False} if on[7] else {}
    if stage == 3:
        zero |= {"sub_group_size": 100} if on[6] else {}
        zero |= {"stage3_param_persistence_threshold": rng.choice((0, 10**9))} if on[7] else {}
        found["zero_init"] = on[8] and not {*MEMORY} & set(found["features"])
        if "experts" in found["features"] and rng.random() < 0.7:
            found["features"] = (*found["features"], "leaf")
    config |= {"prescale_gradients": True} if on[3] else {"gradient_predivide_factor": 2.0} if on[4] else {}
    if on[9] and stage:
        config["communication_data_type"] = "fp32" if "bf16" in precision else "bf16"
    if precision == "bf16-fp32" and stage == 1 and on[10]:
        config["bf16"] = {"enabled": True, "immediate_grad_update": True}
    if rng.random() < 0.98:  # DeepSpeed cannot broadcast these, but for casts to bf16
        gaps = () if "bf16" in precision else ("strided",)
        found["features"] = _without(found["features"], "scalar", "channels last", "transposed", *gaps)
    found["zeroed_by"] = rng.choice(("engine", "module", *(("wrapper",) if stage in (1, 3) else ())))
    if loop == "unmanaged" and stage != 2:  # DeepSpeed refuses both together
        zero.pop("overlap_comm", None)
    if stage == 1 and "overlap_comm" in zero:  # DeepSpeed loses gradients there, see docs/support.md
        found |= {"usage": "always", "features": _without(found["features"], "experts")}
    if rng.random() < 0.05:
        refused, entries, zero_entries, stages = rng.choice(REFUSED)
        if stage in stages and not ("torch_autocast" in entries and precision != "fp32"):
            config, zero, found["refused"] = config | entries, zero | zero_entries, refused
    if config.get("gradient_predivide_factor") == world and stage == 3:
        found["refused"] = "gradient_predivide_factor"
    if rng.random() < 0.03:
        _compile(found)
    found |= {"config": config, "zero": zero}


def _compile(found: dict[str, Any]) -> None:
    found["compiled"] = "engine" if found["stage"] == 3 else "model"
    kept = ("tied", "reused", "frozen", "single", "odd")
    found["features"] = tuple(name for name in found["features"] if name in kept)
    found |= {"checkpointing": "none", "usage": "always"}


def _events(rng: random.Random, found: dict[str, Any]) -> None:
    """Windows and events, those which the way of training has."""
    updates, micros = rng.choice((2, 3, 4)), found["accumulation"]
    stage, loop, precision = found["stage"], found.get("loop", "engine"), found.get("precision", "fp32")
    possible = ["none", "none", "evaluated", "evaluated with gradients", *(("looked at",) if stage is None else ())]
    if (
        found["checkpointing"] in ("none", "non-reentrant")
        and (stage is not None or found["world"] == 1)
        and loop in ("engine", "boundary")
    ):
        # On a CPU, ZeRO 3's own zero_grad() fails there.
        is_wrapper_at_3 = stage == 3 and found["zeroed_by"] == "wrapper"
        possible += ["broken", "broken"] if micros > 1 and not is_wrapper_at_3 else []
    if micros > 1 and loop in ("engine", "boundary"):
        possible += ["thrown away", "thrown away later", *(("loaded",) if stage is not None else ())]
    if micros > 1 and (stage is None or loop not in ("engine", "torch backward")):
        possible += ["short"]
    if micros > 1 and loop == "engine":
        possible += ["idle", "idle"]
    if stage or (stage == 0 and precision == "bf16"):  # in fp32 without ZeRO, DeepSpeed applies such an update
        possible += ["skipped"]
    if stage is not None and loop not in ("torch backward", "coalesce") and rng.random() < 0.1:
        possible += ["second backward"]
    if "compiled" in found:
        possible = ["none"]
    if "fused loss" in found["features"]:  # its forward alone makes gradients
        possible = [event for event in possible if event in ("none", "short", "skipped", "thrown away")]
    events = [rng.choice(possible) for _ in range(updates)]
    if "compiled" not in found and rng.random() < 0.2:
        at = rng.randrange(1, updates)
        events[at] = "saved"
        events = [event if number > at or event != "short" else "none" for number, event in enumerate(events)]
    windows = [
        Window(
            micros - (event == "short"),
            idle=(micros - 2,) if event == "idle" else (),
            poisoned=event == "skipped",
        )
        for event in events
    ]
    needs_two = {"saved", "loaded", "idle", "thrown away", "thrown away later", "broken"}
    if stage is not None and loop == "engine" and not needs_two & {*events} and rng.random() < 0.2:
        windows = _resized(rng, windows)
    found |= {"events": tuple(events), "windows": tuple(windows)}


def _resized(rng: random.Random, windows: list[Window]) -> list[Window]:
    """Twice the samples in a micro-batch, or another number of micro-batches, from some update on."""
    at = rng.randrange(1, len(windows))
    micros = rng.choice((1, 2, 4))
    # DeepSpeed counts all micro-batches modulo the new number.
    if rng.random() < 0.5 and sum(w.micros for w in windows[:at]) % micros == 0:
        return [replace(w, micros=micros) if number >= at else w for number, w in enumerate(windows)]
    return [Window(w.micros, size=4 if number >= at else 2, poisoned=w.poisoned) for number, w in enumerate(windows)]


def _expect(found: dict[str, Any]) -> Draw:
    """The draw, with the refusal that must come: the first of them."""
    stage, features = found["stage"], found["features"]
    is_bf16_optimizer = stage == 1 and found["precision"] == "bf16-fp32"
    is_immediate = "bf16" in found.get("config", {})
    is_cast = "bf16" in found["precision"] or found["precision"] == "fp64"  # a cast makes a tensor of its own
    measures = found["lena"].get("exclude") != ["*"]
    shares = found["checkpointing"] in ("reentrant", "deepspeed") and "reused" in features
    is_stuck = stage in (2, 3) or (stage == 1 and "overlap_comm" in found["zero"] and not is_bf16_optimizer)
    reasons = {
        found.get("refused", ""): True,
        "is expanded": "expanded" in features and not is_cast,
        IN_FORWARD: "fused loss" in features and is_bf16_optimizer and not is_immediate,
        # Tiles without an engine: nobody says which one is the last.
        IN_PARTS: measures and (shares or (stage is None and "tiled" in features)),
    }
    is_stuck = is_stuck or (is_bf16_optimizer and is_immediate)
    at_event = {"second backward": SECOND, **({"broken": BROKEN} if is_stuck else {})}
    in_order = [reason for reason, holds in reasons.items() if reason and holds]
    in_order += [at_event[event] for event in found["events"] if event in at_event]
    return Draw(**found | {"refused": in_order[0] if in_order else ""})
