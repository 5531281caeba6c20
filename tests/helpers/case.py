"""A case of the parity suite: one layout and one training run, as data that both sides read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.helpers.model import Batch, ModelOptions, make_batch
from tests.helpers.reference import Settings
from tests.helpers.reference import Window as ReferenceWindow

UPDATES = 10
NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}
LOSS_SCALE = 2.0**10  # in fp16, unless a case says otherwise
ONE_STEP = ("no_sync", "coalesce")  # loops where every engine.step() is an update, as DeepSpeed's counter sees it
LR = {"adamw": 2e-3, "sgd": 2e-2, "lamb": 5e-3, "lars": 2e-2}
MOMENTS = {"betas": (0.9, 0.99), "eps": 1e-6}
RULE_KEYS: dict[str, dict[str, Any]] = {
    "adamw": MOMENTS,
    "lamb": MOMENTS,
    "sgd": {"momentum": 0.9, "nesterov": False},
    "lars": {"momentum": 0.9, "trust_coefficient": 0.05},
}


@dataclass(frozen=True)
class Window:
    """One update as planned: the same number and size of micro-batches on every rank."""

    micros: int
    size: int = 2  # samples in a micro-batch
    idle: tuple[int, ...] = ()  # micro-batches whose backward is not called
    poisoned: bool = False  # the loss is made infinite, and the layout skips the update


# Which micro-batches use the parameter `sometimes`: (update, rank, micro-batch) -> used.
USAGE: dict[str, Callable[[int, int, int], bool]] = {
    "mixed": lambda update, rank, micro: (update + micro) % 3 != 0,
    "always": lambda update, rank, micro: True,
    "every other window": lambda update, rank, micro: update % 2 == 0,
    "later micro-batches": lambda update, rank, micro: micro > 0,
    "ranks disagree": lambda update, rank, micro: (update + rank) % 3 == 0,
}

SCHEDULES: dict[str, Callable[[int], float]] = {
    "constant": lambda applied: 1.0,
    "decaying": lambda applied: 1.0 / (1.0 + 0.3 * applied),
}


@dataclass(frozen=True)
class Case:
    """Defaults are the middle of the matrix. Mappings are added to what `keys` and the DeepSpeed config say anyway.

    In plain PyTorch `config` has options of DistributedDataParallel.
    """

    name: str
    world: int = 2
    stage: int | None = 1  # None: plain PyTorch, DistributedDataParallel where world > 1
    precision: str = "fp32"  # "bf16", "bf16-fp32" (fp32 accumulation), "fp16" or "autocast" (torch_autocast to bf16)
    accumulation: int = 2
    clipping: float = 0.0
    base: str = "adamw"
    layer: str = "tensor"
    lena: Mapping[str, Any] = field(default_factory=dict)
    zero: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    model: ModelOptions = field(default_factory=ModelOptions)
    usage: str = "mixed"
    schedule: str = "constant"
    windows: tuple[Window, ...] = ()
    groups: str = "named"  # "named", "flat" (one list, as the HF Trainer hands over), "unnamed" (the same, no names)
    optimizer: str = "json"  # "json", "client"; torch's own rule in place of LENA: "stock", or "watched"
    loop: str = "engine"  # how windows are driven, see the runners
    evaluate: str = "never"  # or "between updates", "between micro-batches"
    zero_init: bool = False  # the model is built under deepspeed.zero.Init
    tensor: int = 1  # ranks over which tensors are split; `world` is the product of all these and the replicas
    pipe: int = 1  # stages of a pipeline
    expert: int = 1  # ranks that share the experts of a layer
    sequence: int = 1  # ranks that share a micro-batch
    split: str = ""  # which model they split, see `split_run.py`
    as_on_a_gpu: bool = False  # on the CPU: norms in batches, and recordings, see `launches.py`
    compiled: str = "nothing"  # or "model" (by torch.compile, before the engine), "engine" (by engine.compile)
    repeat: int = 1  # engines made and run one after the other; the last one counts
    device: str = "cpu"  # or "cuda": of the run and, in bf16 and fp16, of the reference's copy of the model

    @property
    def keys(self) -> dict[str, Any]:
        """All LENA keys of the case; warm-ups end during the run, some by the cap."""
        rule = RULE_KEYS[self.base]
        warmup = {"warmup": "layer", "warmup_fraction": 0.2, "warmup_cap": 0.4, "total_steps": 2 * UPDATES}
        common = {"lr": LR[self.base], "base": self.base, "weight_decay": None, "layer": self.layer}
        if self.optimizer in ("stock", "watched"):
            warmup |= {"warmup": "none", "scaling": "none"}
        return common | rule | warmup | dict(self.lena)

    @property
    def plan(self) -> tuple[Window, ...]:
        return self.windows or (Window(self.accumulation),) * UPDATES

    @property
    def is_on_nvme(self) -> bool:
        return self.zero.get("offload_optimizer", {}).get("device") == "nvme"

    @property
    def data_ranks(self) -> int:
        return self.world // (self.tensor * self.pipe * self.sequence)

    def data_rank(self, rank: int) -> int:
        """Of a rank, among those that have data of their own."""
        return rank // (self.tensor * self.sequence) % self.data_ranks

    def expert_rank(self, rank: int) -> int:
        """Of a rank, among those that share the experts of a layer."""
        strided = self.config.get("use_data_before_expert_parallelism", False)
        return rank // (self.world // self.expert) if strided else rank % self.expert

    @property
    def has_deepspeed_moe(self) -> bool:
        return self.split in ("moe", "moe-mixed")

    @property
    def spread(self) -> str:
        """How the names of the layers begin whose experts are shared."""
        return "h.1." if "mixed" in self.split else "h."

    @property
    def together(self) -> tuple[tuple[int, ...], ...]:
        """The ranks whose micro-batches make one micro-gradient of an expert."""
        seen: dict[int, int] = dict.fromkeys(range(self.expert), 0)
        groups: dict[int, list[int]] = {}
        for rank in range(self.data_ranks):
            place = self.expert_rank(rank)
            groups.setdefault(seen[place], []).append(rank)
            seen[place] += 1
        return tuple(map(tuple, groups.values()))

    @property
    def narrow(self) -> torch.dtype | None:
        """The type in which the reference has its copy of the model, None for no copy."""
        return NARROW.get(self.precision.partition("-")[0])

    @property
    def settings(self) -> Settings:
        """The run as the reference must train it."""
        return Settings(
            clipping=self.clipping,
            schedule=SCHEDULES[self.schedule],
            idle="zeros" if self.stage is not None else "skipped",
            narrow=self.narrow,
            together=self.together if self.expert > 1 else (),
            spread=self.spread,
            device=self.device if self.narrow else "cpu",
        )

    def batch(self, update: int, rank: int, micro: int) -> Batch:
        """`rank`: among the data-parallel ones."""
        used = USAGE[self.usage](update, rank, micro)
        return make_batch(update, rank, micro, self.plan[update].size, used)

    def reference_windows(self) -> list[ReferenceWindow]:
        """All ranks' batches of every window, without those whose backward is not called."""
        return [
            ReferenceWindow(
                batches=[
                    [self.batch(update, rank, micro) for micro in range(window.micros) if micro not in window.idle]
                    for rank in range(self.data_ranks)
                ],
                divisor=window.micros,
                batch_size=window.size,
                applied=not window.poisoned,
            )
            for update, window in enumerate(self.plan)
        ]

    def deepspeed_config(self) -> dict[str, Any]:
        """The DeepSpeed config, its optimizer entry included unless the client brings one."""
        first = self.plan[0]
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": first.size,
            "gradient_accumulation_steps": 1 if self.loop in ONE_STEP else first.micros,
            "gradient_clipping": self.clipping,
            "steps_per_print": 1_000_000,
            "zero_optimization": {
                "stage": self.stage,
                "reduce_bucket_size": 4000,
                "allgather_bucket_size": 4000,
                "stage3_prefetch_bucket_size": 1000,
                "stage3_param_persistence_threshold": 100,
                # ZeRO-3's own linear function rounds bf16 gradients differently from the reference's.
                "memory_efficient_linear": self.precision == "fp32",
            }
            | dict(self.zero),
        }
        if self.precision == "autocast":
            config["torch_autocast"] = {"enabled": True, "dtype": "bf16"}
        if self.precision.startswith("bf16"):
            config["bf16"] = {"enabled": True}
            config["data_types"] = {"grad_accum_dtype": "bf16" if self.precision == "bf16" else "fp32"}
        if self.precision == "fp16":
            config["fp16"] = {"enabled": True, "loss_scale": LOSS_SCALE}
        if self.optimizer == "json":
            config["optimizer"] = {"type": "LENA", "params": self.keys}
        if self.split.startswith("autotp"):
            config["tensor_parallel"] = {"autotp_size": self.tensor}
        if self.optimizer in ("stock", "watched"):
            config["zero_allow_untested_optimizer"] = True
        return config | dict(self.config)
