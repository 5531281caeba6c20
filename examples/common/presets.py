"""`--optimizer-preset`: the optimizer entry of the DeepSpeed config, swapped for a rival's."""

import json
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parents[2] / "configs"
PRESETS = ("lena", "adascale", "linear-scaling", "sqrt-scaling", "lamb", "lars", "lena-lamb", "adamw")

_WITH_BETAS = ("adamw", "lamb")  # base rules that have betas and eps
_KEPT = ("no_decay", "exclude", "base_batch_size")  # what belongs to the model and the batch, not to the method
_FROM_ARGUMENTS = {"lr": "learning_rate", "weight_decay": "weight_decay"}

HELP = (
    "Train with this optimizer instead of the one in the DeepSpeed config; no file is changed. adamw is torch's, by "
    "DeepSpeed; the others are those of configs/NAME.json. Learning rate and weight decay are those of the command "
    "line, else those of configs/NAME.json, else the script's. With lamb, lars and adamw the learning rate is for the "
    "whole batch of an update: tune it anew when the batch changes. With the others it is for a single micro-batch. "
    "adamw has no warm-up of its own: give --warmup_steps; so may adascale. The others warm up by themselves: leave it "
    "at 0."
)


def entry(preset: str, replaced: dict[str, Any], no_decay: list[str]) -> dict[str, Any]:
    """The optimizer entry of ``preset``, with "auto" for all that HF fills from its arguments.

    Args:
        replaced: the entry whose place it takes; of LENA's, what it says of the model and the batch is kept.
        no_decay: patterns of the names that are not decayed, where ``replaced`` has none.
    """
    if preset == "adamw":  # DeepSpeed's own name for torch's; it decays all that HF hands over, which is one flat list
        return {"type": "AdamW", "params": {"torch_adam": True} | dict.fromkeys(_auto("adamw"), "auto")}
    params = _params(preset)
    params.pop("total_steps", None)  # HF's count
    params |= dict.fromkeys(_auto(params.get("base", "adamw")), "auto")
    kept = (replaced.get("params") or {}) if replaced.get("type") == "LENA" else {}
    params |= {"no_decay": no_decay} | {key: kept[key] for key in _KEPT if key in kept}
    return {"type": "LENA", "params": params}


def defaults(preset: str) -> dict[str, float]:
    """What configs/NAME.json says of HF's arguments."""
    params = {} if preset == "adamw" else _params(preset)
    return {name: params[key] for key, name in _FROM_ARGUMENTS.items() if key in params}


def _auto(base: str) -> tuple[str, ...]:
    return ("lr", "weight_decay", *(("betas", "eps") if base in _WITH_BETAS else ()))


def _params(preset: str) -> dict[str, Any]:
    return dict(json.loads((CONFIGS / f"{preset}.json").read_text())["optimizer"]["params"])
